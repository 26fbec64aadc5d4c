"""FLOPs, bytes and communication from a compiled program's text, against counts by hand and jax's own."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from ivideo.devices import flops, sharding
from ivideo.planning import hlo
from ivideo.planning.hlo import Program


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def compiled(fn, *args, **options):
    return Program(jax.jit(fn, **options).lower(*args).compile().as_text())


def test_small_products_in_a_loop_count_as_often_as_it_runs():
    def fn(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    args = array(8, 16), array(5, 16, 16)
    assert compiled(fn, *args).flops == 5 * 2 * 8 * 16 * 16 == flops.count(fn, *args)
    nested = compiled(lambda x, w: lax.fori_loop(0, 3, lambda _, x: fn(x, w), x), *args)
    assert nested.flops == 3 * 5 * 2 * 8 * 16 * 16


TEXT = """HloModule test

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %near = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy(%x)
  %start = (bf16[8,128]{1,0:S(1)}, bf16[8,128]{1,0}, u32[], u32[]) collective-permute-start(%near)
  %moved = bf16[8,128]{1,0} collective-permute-done(%start)
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} add(%moved, %near)
  ROOT %t = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%i, %y)
}

%condition (p.1: (s32[], bf16[8,128])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %n = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

%sliced (param_0: f32[10,64,32], param_1: s32[]) -> f32[64,32] {
  %param_0 = f32[10,64,32]{2,1,0} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %slice = f32[1,64,32]{2,1,0} dynamic-slice(%param_0, %param_1, %param_1, %param_1), dynamic_slice_sizes={1,64,32}
  ROOT %layer = f32[64,32]{1,0} bitcast(%slice)
}

ENTRY %main (a: bf16[8,128], w: f32[10,64,32], at: s32[], image: f32[2,8,8,3]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = f32[10,64,32]{2,1,0} parameter(1)
  %at = s32[]{:T(128)} parameter(2)
  %image = f32[2,8,8,3]{3,2,1,0} parameter(3)
  %kernel = f32[3,3,3,5]{3,2,1,0} constant({...})
  %m = f32[2,4,4,5] convolution(%image, %kernel), window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_01io->b01f
  %layer.1 = f32[64,32]{1,0} fusion(%w, %at), kind=kLoop, calls=%sliced
  %gathered = f32[64,32]{1,0} all-gather(%layer.1), dimensions={0}
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%at, %a)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%state), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_small_bytes_of_main_memory_by_hand():
    x, layer = 8 * 128 * 2, 64 * 32 * 4
    # copy reads x and writes on-chip memory; the permute writes x and two numbers; the sum reads what moved and writes
    body = x + (x + 8) + 2 * x
    image, kernel, made = 4 * 2 * 8 * 8 * 3, 4 * 9 * 15, 4 * 2 * 16 * 5
    # the fusion reads one of the ten layers and an index, the gather reads and writes it
    assert Program(TEXT).bytes == 6 * body + (2 * layer + 4) + 2 * layer + (image + kernel + made)


def test_small_convolution_without_its_padding():
    # of rows 0 to 7 at stride 2 the windows 0, 2, 4 meet three and the last one two: 11 pairs a direction
    assert Program(TEXT).flops == 2 * 2 * 11 * 11 * 3 * 5


def test_small_communication_by_kind():
    found = Program(TEXT).collectives({"w": array(10, 64, 32)})
    assert list(found) == ["all-gather of parameters", "collective-permute of activations"]
    assert found["all-gather of parameters"]["bytes"] == 64 * 32 * 4
    permute = found["collective-permute of activations"]
    assert (permute["count"], permute["runs"], permute["bytes"]) == (1, 6, 6 * 8 * 128 * 2)
    assert permute["largest"] == "bf16[8,128]"
    assert "all-gather of activations" in Program(TEXT).collectives()


def test_small_a_sum_of_parts_among_zeros_is_a_gather():
    text = """HloModule test
%into (zeros: f32[64,32], part: f32[8,32], at: s32[]) -> f32[64,32] {
  %zeros = f32[64,32]{1,0} parameter(0)
  %part = f32[8,32]{1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %u = f32[64,32]{1,0} dynamic-update-slice(%zeros, %part, %at, %at)
}

ENTRY %main (x: f32[64,32], part: f32[8,32], at: s32[]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %part = f32[8,32]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %among = f32[64,32]{1,0} fusion(%x, %part, %at), kind=kLoop, calls=%into
  %view = f32[16,128]{1,0} bitcast(%among)
  %sums = (f32[16,128]{1,0}, f32[64,32]{1,0}) all-reduce(%view, %x), to_apply=%add
  ROOT %out = f32[64,32]{1,0} get-tuple-element(%sums), index=1
}
"""
    found = Program(text).collectives({"w": array(64, 32)})
    assert {name: (entry["count"], entry["bytes"]) for name, entry in found.items()} == {
        "all-gather of activations": (1, 64 * 32 * 4),
        "all-reduce of parameters": (1, 64 * 32 * 4),
    }


def test_small_a_split_product_communicates():
    mesh = sharding.make_mesh({"fsdp": 8})
    whole, rows = sharding.replicated(mesh), sharding.logical_sharding(mesh, (64, 32), ("batch",))
    args = (
        jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=whole),
    )
    program = compiled(lambda x, w: x @ w, *args, out_shardings=rows)
    assert (program.flops, program.collectives()) == (2 * 64 * 32 * 64 // 8, {})
    program = compiled(lambda x, w: x @ w, *args, out_shardings=whole)
    assert program.collectives()["all-gather of activations"]["bytes"] == 64 * 64 * 4


@pytest.mark.parametrize(
    ("image", "kernel", "stride", "holes", "spread", "padding"),
    [(8, 3, 1, 1, 1, 1), (8, 3, 2, 1, 1, 0), (5, 3, 1, 2, 1, 2), (9, 3, 1, 1, 2, 2), (1, 16, 1, 1, 1, 15)],
)
def test_small_positions_by_counting(image, kernel, stride, holes, spread, padding):
    dilated = (image - 1) * holes + 1
    result = (dilated + 2 * padding - ((kernel - 1) * spread + 1)) // stride + 1
    wanted = 0
    for out in range(result):
        for k in range(kernel):
            place = out * stride + k * spread - padding
            wanted += 0 <= place < dilated and place % holes == 0
    options = dict(padding=padding, stride=stride, holes=holes, spread=spread)
    assert hlo._positions(image, kernel, result, **options) == wanted > 0


def test_small_what_is_not_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("HloModule nothing")
    with pytest.raises(ValueError, match="the loop loop runs an unknown number of times"):
        Program(TEXT.replace("constant(6)", "parameter(1)")).flops  # noqa: B018


def test_small_array_sizes():
    assert hlo.Array("bf16", (3, 5)).bytes == 30
    assert hlo.Array("pred", (3,)).bytes == 3
    assert hlo.Array("s4", (3,)).bytes == 2
    assert hlo.Array("f32", (3,), on_chip=True).traffic == 0
    assert hlo.Array("f32", ()).size == math.prod(())
