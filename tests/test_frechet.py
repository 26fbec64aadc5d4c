"""Fréchet and kernel distances against their formulas in float64, and the statistics in memory and in files."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import scipy.linalg

from ivideo.errors import UserError
from ivideo.evaluation import bootstrap, frechet, kernel_distance, measures

PROTOCOL = {"network": "i3d", "frames": 16}


def gaussian(rng, dims, rank):
    """A mean, and a factor [dims, rank] of a covariance whose scales differ by a factor of a thousand."""
    return rng.normal(size=dims), rng.normal(size=(dims, rank)) * np.logspace(0, -1.5, rank) / np.sqrt(rank)


def statistics(mean, factor):
    return frechet.Statistics(1001, mean, 1000 * factor @ factor.T)


def reference(first, second):
    """The distance by scipy's square root of the product of the covariances."""
    (mean, f), (other_mean, g) = first, second
    a, b = f @ f.T, g @ g.T
    return float(np.sum((mean - other_mean) ** 2) + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real))


@pytest.mark.parametrize("dims", [64, 96])
@pytest.mark.parametrize("share", [1, 0.3])
def test_small_frechet_distance_is_that_of_scipys_square_root(dims, share):
    rng = np.random.default_rng(dims)
    first, second = (gaussian(rng, dims, int(dims * share)) for _ in range(2))
    found = frechet.distance(statistics(*first), statistics(*second))
    assert found == pytest.approx(reference(first, second), rel=1e-6)


@pytest.mark.parametrize(("dims", "rank"), [(2048, 2048), (2048, 600)])
def test_frechet_distance_of_inceptions_2048_dimensions(dims, rank):
    """With Σ₂ = TΣ₁T, where T is symmetric and positive, the root of the product has the trace of TΣ₁."""
    rng = np.random.default_rng(rank)
    mean, factor = gaussian(rng, dims, rank)
    rows = rng.normal(size=(dims, 5))
    change = np.diag(rng.uniform(0.5, 1.5, dims)) + rows @ rows.T / dims
    other = change @ factor
    wanted = (factor**2).sum() + (other**2).sum() - 2 * (factor * other).sum() + 1e-4 * dims
    found = frechet.distance(statistics(mean, factor), statistics(mean + 0.01, other))
    assert found == pytest.approx(wanted, rel=1e-6)


def test_small_frechet_distance_of_few_samples_keeps_its_digits():
    """Equal means and nearly equal covariances of rank 9 in 60 dimensions: the traces nearly cancel."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(60, 9))
    other = factor + 1e-3 * rng.normal(size=factor.shape)
    found = frechet.distance(statistics(np.zeros(60), factor), statistics(np.zeros(60), other))
    # The trace of the root is the sum of the singular values of a product of the true factors
    wanted = (factor**2).sum() + (other**2).sum() - 2 * scipy.linalg.svdvals(factor.T @ other).sum()
    assert wanted < 1e-5 * (factor**2).sum()
    assert found == pytest.approx(wanted, rel=1e-6)
    assert frechet.distance(statistics(np.zeros(60), factor), statistics(np.zeros(60), factor)) == pytest.approx(
        0, abs=1e-9
    )


def test_small_frechet_distance_of_one_dimension():
    """(μ₁ − μ₂)² + (σ₁ − σ₂)²"""
    first, second = (statistics(np.array([mean]), np.array([[std]])) for mean, std in ((1.0, 2.0), (4.0, 7.0)))
    assert frechet.distance(first, second) == pytest.approx(9 + 25, rel=1e-12)


def test_small_statistics_of_parts_merge_to_those_of_the_whole():
    features = np.random.default_rng(0).normal(size=(101, 7)) * 3 + 1000
    parts = [frechet.measure(part, PROTOCOL) for part in np.split(features, [1, 40, 41])]
    merged = frechet.merge(parts)
    assert merged.count == 101 and merged.protocol == PROTOCOL
    np.testing.assert_allclose(merged.mean, features.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(merged.covariance, np.cov(features, rowvar=False), rtol=1e-11)
    counts = np.random.default_rng(1).integers(0, 3, 101)
    drawn = frechet.measure(features, counts=counts)
    np.testing.assert_allclose(drawn.covariance, np.cov(np.repeat(features, counts, axis=0), rowvar=False), rtol=1e-11)


def test_small_statistics_in_a_file_are_the_same(tmp_path):
    written = frechet.measure(np.random.default_rng(0).normal(size=(9, 4)), PROTOCOL)
    path = str(tmp_path / "reference.npz")
    frechet.save(path, {"fvd": written, "fid": dataclasses.replace(written, sample=np.ones((2, 4), np.float32))})
    read, other = frechet.load(path)["fvd"], frechet.load(path)["fid"]
    assert read.sample is None and other.sample.dtype == np.float32 and other.sample.tolist() == [[1] * 4] * 2
    assert read.digest == written.digest and frechet.distance(read, written) == pytest.approx(0, abs=1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["reference.npz"]
    assert read.digest != frechet.measure(np.ones((9, 4)), PROTOCOL).digest


def test_small_statistics_that_cannot_be_read_are_one_line_errors(tmp_path):
    good, path = tmp_path / "good.npz", str(tmp_path / "bad.npz")
    frechet.save(str(good), {"fvd": frechet.measure(np.eye(4), PROTOCOL)})
    contents = {
        b"": "not a complete .npz file",
        b"mu": "not a complete .npz file",
        good.read_bytes()[:500]: "not a complete .npz file",
    }
    for content, message in contents.items():
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match=rf"^{re.escape(path)} is {message}.*copy it again$"):
            frechet.load(path)
    with pytest.raises(UserError, match="absent.npz is not a complete .npz file of statistics .*No such file"):
        frechet.load(str(tmp_path / "absent.npz"))
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(UserError, match=r"has no fvd/mean \(it holds mu, sigma\): expected statistics that this"):
        frechet.load(path)
    arrays = {"count": 3, "mean": np.zeros(4), "scatter": np.eye(4), "sample": np.ones((2, 4)), "protocol": "{}"}
    arrays = {f"fid/{name}": value for name, value in arrays.items()}
    np.savez(path, **arrays | {"fid/scatter": np.eye(3)})
    with pytest.raises(UserError, match=r"'scatter': \(3, 3\)"):
        frechet.load(path)
    np.savez(path, **{name: value for name, value in arrays.items() if name != "fid/sample"})
    with pytest.raises(UserError, match="has no fid/sample"):
        frechet.load(path)
    np.savez(path, **arrays | {"fid/mean": np.array([object()])})
    with pytest.raises(UserError, match="Object arrays cannot be loaded"):
        frechet.load(path)


def test_small_statistics_of_different_protocols_are_not_compared():
    first = frechet.measure(np.eye(4), PROTOCOL)
    second = frechet.measure(np.eye(4), PROTOCOL | {"frames": 9})
    message = "frames is 16 in one and 9 in the other; measure both in the same way"
    for compare in (frechet.distance, lambda *both: frechet.merge(both)):
        with pytest.raises(UserError, match=message):
            compare(first, second)
    with pytest.raises(UserError, match="statistics of 4 and 3 dimensions"):
        frechet.distance(first, frechet.measure(np.eye(3), PROTOCOL))
    with pytest.raises(ValueError, match="1 samples have no covariance"):
        frechet.distance(frechet.measure(np.eye(4)[:1]), frechet.measure(np.eye(4)))
    with pytest.raises(ValueError, match="not finite"):
        frechet.measure(np.full((2, 2), np.nan))


@pytest.mark.parametrize(("block", "group"), [(7, 1), (1024, 1), (7, 3), (1024, 3)])
def test_small_kernel_distance_is_the_formula(block, group):
    """The mean of the kernel over all pairs of samples of different clips, one pair after the other."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 5)), rng.normal(size=(18, 5)) + 0.3

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    def within(z):
        return np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i // group != j // group])

    wanted = within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    options = {"block": block, "group": group}
    assert kernel_distance.distance(x, y, **options) == pytest.approx(wanted, rel=1e-12)
    assert kernel_distance.distance_interval(x, y, **options, replicates=5)[0] == pytest.approx(wanted, rel=1e-12)
    # A replicate weights each sample by how often its clip was drawn; pairs of one clip do not count
    drawn = np.array([[2, 0, 1, 0, 1, 1, 0, 3], [1, 1, 2, 0, 0, 2, 1, 1]]).repeat(group, axis=1)[:, : len(x)]
    found = kernel_distance._mean_kernel(x[: drawn.shape[1]], x[: drawn.shape[1]], drawn, drawn, block, group=group)
    for weights, value in zip(drawn, found, strict=True):
        pairs = [
            (weights[i] * weights[j], kernel(x[i], x[j]))
            for i, j in itertools.product(range(len(weights)), repeat=2)
            if i // group != j // group
        ]
        assert value == pytest.approx(sum(w * k for w, k in pairs) / sum(w for w, _ in pairs), rel=1e-12)


def test_small_kernel_distance_of_one_distribution_is_0_on_average():
    rng = np.random.default_rng(0)
    found = [kernel_distance.distance(*rng.normal(size=(2, 20, 3))) for _ in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 20
    # Nor do frames of one clip, which are nearly the same, make it larger
    centres = rng.normal(size=(400, 2, 8, 1, 3))
    frames = (centres + 0.1 * rng.normal(size=(400, 2, 8, 4, 3))).reshape(400, 2, 32, 3)
    found = [kernel_distance.distance(*both, group=4) for both in frames]
    assert abs(np.mean(found)) < 3 * np.std(found) / 20
    assert np.mean([kernel_distance.distance(*both) for both in frames]) > 5 * np.std(found) / 20
    # Two clips: half of the replicates draw one of them twice
    _, (low, high) = kernel_distance.distance_interval(*frames[0][:, :8], group=4, replicates=20)
    assert np.isfinite([low, high]).all()
    with pytest.raises(ValueError, match="There are 4 and 8 features of clips with 4 features each, expected two"):
        kernel_distance.distance(frames[0][0][:4], frames[0][1][:8], group=4)
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(2, 4\)"):
        kernel_distance.distance(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="1 and 2 features, expected two"):
        kernel_distance.distance(np.ones((1, 3)), np.ones((2, 3)))


def test_small_bootstrap_intervals_have_the_width_of_repeated_draws():
    """Of 100 repetitions with new samples, 95% lie in an interval of the width that one of them found."""
    rng = np.random.default_rng(0)
    centre, (low, high) = bootstrap.mean_interval(rng.normal(size=500), replicates=2000)
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(500), rel=0.1)
    assert low < centre < high
    with pytest.raises(ValueError, match="no values"):
        bootstrap.mean_interval([])
    true = frechet.Statistics(1001, np.zeros(4), 1000 * np.eye(4))
    other = rng.normal(size=(80, 4)) + 0.5
    repeated = [frechet.distance(frechet.measure(rng.normal(size=(60, 4)) * 1.5), true) for _ in range(100)]
    estimate, (low, high) = frechet.distance_interval(rng.normal(size=(60, 4)) * 1.5, true, replicates=200)
    assert high - low == pytest.approx(2 * 1.96 * np.std(repeated), rel=0.3)
    assert low < estimate < high
    repeated = [kernel_distance.distance(rng.normal(size=(60, 4)), other) for _ in range(100)]
    estimate, (low, high) = kernel_distance.distance_interval(rng.normal(size=(60, 4)), other, replicates=200)
    assert low < estimate < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(repeated), rel=0.6)


def test_small_intervals_have_only_values_that_a_measure_can_have():
    """A share is between 0 and 1, and a Fréchet distance is not negative; an unbiased kernel distance may be."""
    for successes in range(17):
        share, (low, high) = bootstrap.mean_interval(np.arange(16) < successes)
        assert 0 <= low <= share == successes / 16 <= high <= 1
    features = np.random.default_rng(0).normal(size=(50, 4))
    estimate, (low, high) = frechet.distance_interval(features, frechet.measure(features))
    assert low == 0 and abs(estimate) < 1e-9 < high


def test_small_distances_of_fewer_clips_are_of_clips_from_the_whole_set():
    """Features in one dimension that rise from clip to clip, against a normal distribution: |m|² + (s - 1)²."""
    features = np.linspace(-3, 5, 16)[:, None]
    reference = frechet.Statistics(2, np.zeros(1), np.ones((1, 1)), {})
    found = measures.fewer_clips({"i3d": features}, {"fvd": reference})
    chosen = {2: [0, 15], 4: [0, 5, 10, 15], 8: [0, 2, 4, 6, 9, 11, 13, 15], 16: list(range(16))}
    assert list(found) == ["2", "4", "8", "16"]
    for count, numbers in chosen.items():
        some = features[numbers, 0]
        assert found[str(count)] == pytest.approx(some.mean() ** 2 + (some.std(ddof=1) - 1) ** 2, rel=1e-9)
