"""Progressive distillation of a stage, phase by phase. Section 2.7.

Each phase (`ivideo.stages.phases`) is a run of the training loop in its own folder, with the step of
`ivideo.training.distill_step`. Its student is the teacher of the next phase. The files are listed in
`ivideo.training.students`.
"""

import functools
import json
import logging
import os

import jax
import numpy as np

from ivideo import checks, files, recipe, stages
from ivideo.devices import agreeing, sharding
from ivideo.errors import UserError
from ivideo.training import distill_step, loop, students, trained
from ivideo.training.agreement import Agreement
from ivideo.training.checkpoint import check_workdir
from ivideo.training.step import TrainState, check_batch
from ivideo.weights import load_params

log = logging.getLogger("ivideo")

# Config keys that cannot change once a distillation has started, besides those of the network
FIXED = ("video.", "cond.", "diffusion.", "distill.teacher_steps")


def distill(config, teacher: str, workdir: str, *, devices=None, profile_steps: tuple[int, int] | None = None) -> str:
    """Runs the phases that are not finished yet in `workdir`. Returns the file of the last student.

    `config`: the config of the original network. `teacher`: the folder of its training run, or a file of its averaged
    parameters, which are first copied to `workdir`. `devices`: the devices to use, all by default. `profile_steps`: the
    first and the last step to profile, of the phase that runs first. All processes of `jax.distributed` call this
    together. After a signal to stop, it saves and exits as training does.
    UserError, before anything is compiled or written, if the teacher's weights are of another network or of a student,
    or if `workdir` belongs to another run or another teacher.
    """
    checks.check(config)
    checks.check_original(config)
    if config.train.start:
        raise UserError(
            f"config.train.start = {config.train.start}: a student starts from --teacher={teacher}; leave it empty"
        )
    check_workdir(workdir)
    mesh = sharding.make_mesh(config.train.mesh, devices)
    check_batch(config, mesh)
    phases = stages.phases(config)
    kept = agreeing.from_first_process(lambda: _check_folders(config, teacher, workdir))
    problems = agreeing.from_first_process(lambda: students.find_problems(workdir, config))
    lineage = list(zip(phases, (students.TEACHER, *phases), strict=False))
    if all(problem == "" for problem in problems.values()):
        agreeing.from_first_process(lambda: [_check_lineage(workdir, *pair) for pair in lineage])
        # A process that was killed right after the last record has not written its row
        agreeing.from_first_process(lambda: students.write_rows(workdir, config))
        return _report_finished(config, workdir)
    with loop.prepared(config, workdir, mesh) as context:
        recipe.save_run_config(config, workdir)
        for phase, problem in problems.items():
            if problem:
                agreeing.from_first_process(lambda: students.set_aside(workdir, phase, problem))  # noqa: B023
        if problems[students.TEACHER] != "":
            _copy_teacher(config, workdir, teacher, kept)
        distillation = Distillation(config, workdir, context)
        for phase, before in lineage:
            if problems[phase] != "":
                distillation.run(phase, before, profile_steps=profile_steps)
                profile_steps = None
            agreeing.from_first_process(lambda: _check_lineage(workdir, phase, before))  # noqa: B023
    return _report_finished(config, workdir)


class Distillation:
    """What the phases share: the text encoder, the compiled steps and the measurement of the agreement."""

    def __init__(self, config, workdir: str, context: loop.RunContext):
        self.config, self.workdir, self.context = config, workdir, context
        self.step = functools.cache(self._jit_step)

    @functools.cached_property
    def agreement(self) -> Agreement:
        """Compares students with their teachers."""
        return Agreement(self.config, self.context)

    def _jit_step(self, kind):
        """The jitted step for one kind of student. It serves every round, since the number of steps is an argument."""
        mesh = self.context.mesh
        step = distill_step.make_distill_step(self.config, mesh, kind)
        state_shardings = sharding.param_shardings(mesh, distill_step.state_shapes(self.config))
        return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, sharding.replicated(mesh)))

    def run(self, phase: str, before: str, *, profile_steps: tuple[int, int] | None = None) -> None:
        """Runs a phase from its newest checkpoint and writes its student. The student of `before` is the teacher."""
        agreeing.from_first_process(lambda: students.begin(self.workdir, phase, before))
        task = Phase(self, phase, before)
        folder, mesh = os.path.join(self.workdir, phase), self.context.mesh
        if jax.process_index() == 0:
            files.write_json(os.path.join(folder, recipe.RUN_CONFIG), task.config.to_dict())
        iterator = loop.make_process_data(task.config, self.context.encoder, mesh)
        context = self.context._replace(iterator=iterator)
        state = loop.run(task, folder, context, profile_steps=profile_steps)
        loop.exit_if_stopped(task.config, state, folder)
        measured = task.measure(state)
        params = _to_first_host(state.params)

        def finish():
            row = {
                "phase": phase, "sampler": task.config.sample.sampler, "steps": task.steps,
                "updates": task.config.train.steps, "loss": _last_loss(folder, task.config.train.log_every),
                **measured,
            }  # fmt: skip
            teacher = students.record(self.workdir, before)["weights"]
            config = stages.distilled(self.config, phase)
            students.finish(self.workdir, phase, params, config=config, teacher=teacher, row=row)
            students.write_rows(self.workdir, self.config)
            log.info("%s is finished: agreement %.1f dB with its teacher", task.name, measured["agreement"])

        agreeing.from_first_process(finish)


class Phase:
    """The task of one phase, see `ivideo.training.loop.Training`."""

    def __init__(self, distillation: Distillation, phase: str, before: str):
        """`before`: the phase whose student is the teacher, or `students.TEACHER`."""
        self._shared, config = distillation, distillation.config
        mesh, phases = distillation.context.mesh, stages.phases(config)
        self._kind, self.steps = stages.student(config, phase)
        self.config = stages.distilled(config, phase)
        self.config.train.steps = distill_step.updates(config, self._kind, self.steps)
        # Each phase reads the clips in another order
        self.config.seed = (config.seed + 1 + phases.index(phase)) % (2**32 - 1)
        self.name = f"{config.stage} {phase} ({phases.index(phase) + 1} of {len(phases)})"
        self.inspect_every = config.distill.agreement_every
        teacher_config = config if before == students.TEACHER else self.config
        params = load_params(students.weights_path(distillation.workdir, before), stages.param_shapes(teacher_config))
        self._teacher = sharding.from_host(params, sharding.param_shardings(mesh, params))
        self._measured = {}  # by step

    def shapes(self) -> TrainState:
        return distill_step.state_shapes(self._shared.config)

    def initial_state(self, shardings) -> TrainState:
        init = jax.jit(lambda params: distill_step.init_state(self._shared.config, params), out_shardings=shardings)
        return init(self._teacher)

    def compile_step(self, shardings):
        mesh, config = self._shared.context.mesh, self._shared.config
        teacher_shardings = sharding.param_shardings(mesh, self._teacher)
        cast = jax.jit(lambda params: distill_step.teacher_params(config, params), out_shardings=teacher_shardings)
        # The student started from float32 weights; the step takes them in `config.distill.teacher_dtype`
        self._teacher = teacher = cast(self._teacher)
        step, num_steps = self._shared.step(self._kind), np.int32(self.steps)
        return lambda state, batch: step(state, teacher, batch, num_steps)

    def flops(self) -> int:
        return distill_step.model_flops(self._shared.config, self._kind)

    def already_finished(self) -> None:
        """The steps are done, and the student's weights are still to be written: there is nothing to warn about."""

    def measure(self, state: TrainState) -> dict[str, float]:
        """Returns the agreement with the teacher and the seconds per sample, see `Agreement.measure`."""
        if (step := int(state.step)) not in self._measured:
            # A student of the stochastic sampler jumps over two of its teacher's steps, so half as many remain
            steps = max(self.steps // 2, 1) if self._kind == "stochastic" else self.steps
            teacher_steps = 2 * self.steps if self._kind == "deterministic" else self.steps
            self._measured[step] = self._shared.agreement.measure(
                state.params, self._teacher, steps=steps, teacher_steps=teacher_steps,
                original=self._kind == "guidance",
            )  # fmt: skip
        return self._measured[step]

    def inspect(self, step: int, state: TrainState, reporter) -> None:
        scalars = {**self.measure(state), "steps": self.steps}
        note = f"agreement {scalars['agreement']:.1f} dB"
        reporter.measured(step, {f"distill/{name}": value for name, value in scalars.items()}, note)
        if self.config.train.sample_every:
            reporter.samples(step, lambda: loop.sample_prompts(self.config, self._shared.context.encoder, state.params))


def _check_folders(config, teacher: str, workdir: str) -> dict | None:
    """Checks the teacher and the working folder. Writes nothing.

    Returns the `source` and `identity` of the teacher that the distillation in `workdir` started with, or None if there
    is none yet. UserError if the two folders do not fit the config or each other.
    """
    if not students.is_distillation(workdir):
        found = [name for name in ("checkpoints", students.RECORD) if os.path.exists(os.path.join(workdir, name))]
        if found:
            raise UserError(
                f"--workdir={workdir} has {found[0]} of another run: give a new folder, or that of this distillation"
            )
        _check_teacher(config, teacher)
        return None
    kept = recipe.read_run_config(workdir)
    if kept is not None:
        recipe.check_network(f"the distillation in {workdir}", kept, config)
        for key, there, here in recipe.differences(kept, config, FIXED):
            raise UserError(
                f"the distillation in {workdir} started with config.{key} = {there!r}, and it is {here!r} now: keep "
                "the old value, or give another --workdir"
            )
    kept = students.record(workdir, students.TEACHER)["teacher"]
    # The training run may have gone on since, or be deleted: its weights were copied
    if os.path.abspath(teacher) != kept["source"] or os.path.isfile(teacher):
        identity = _check_teacher(config, teacher)
        if identity != kept["identity"]:
            raise UserError(
                f"the distillation in {workdir} started with the teacher {kept['source']} ({kept['identity']}), and "
                f"--teacher={teacher} ({identity}) is another: give that one, or another --workdir"
            )
    return kept


def _check_teacher(config, teacher: str) -> str:
    """Returns the identity of the teacher's weights. UserError if they are not those of an original network."""
    if students.is_distillation(teacher) or students.is_finished(teacher):
        raise UserError(f"--teacher={teacher} is a distillation: give the training run of the original network")
    found = trained.saved_config(config, teacher)
    if found and found.get("phase"):
        raise UserError(
            f"--teacher={teacher} is itself a student of distillation, of phase {found['phase']}: give the weights of "
            "the original network"
        )
    return trained.check(config, teacher, flag="--teacher")


def _copy_teacher(config, workdir: str, teacher: str, kept: dict | None) -> None:
    """Copies the teacher's weights to the working folder. `kept`: the record of a copy that is damaged, if any."""
    identity = agreeing.from_first_process(lambda: _check_teacher(config, teacher))
    if kept and identity != kept["identity"]:
        raise UserError(
            f"{students.weights_path(workdir, students.TEACHER)} is damaged, and {teacher} has other weights now: copy "
            "back the weights that the distillation started with"
        )
    params = _to_first_host(trained.load(config, teacher))
    origin = {"source": os.path.abspath(teacher), "identity": identity}
    agreeing.from_first_process(
        lambda: students.finish(workdir, students.TEACHER, params, config=config, teacher=origin)
    )


def _check_lineage(workdir: str, phase: str, before: str) -> None:
    """UserError if the teacher of a finished phase is no longer the student of the phase before it."""
    folder, teacher = os.path.join(workdir, phase), os.path.join(workdir, before)
    if students.record(workdir, phase)["teacher"] != students.record(workdir, before)["weights"]:
        raise UserError(
            f"the teacher of {folder} was not the student that is in {teacher} now: move {folder} away to repeat that "
            "phase"
        )


def _report_finished(config, workdir: str) -> str:
    """Logs that all phases are finished and where the last student is. Returns its file."""
    last = stages.distilled(config)
    path = students.weights_path(workdir, last.phase)
    log.info(
        "the distillation of %s is finished: %s is for the sampler %r in %d steps; use it with --workdir=%s and the "
        "variant %s_distilled",
        config.stage, path, last.sample.sampler, last.sample.steps, workdir, config.variant,
    )  # fmt: skip
    return path


def _to_first_host(params):
    """Parameters as numpy arrays in the first process. The others take part in collecting them and get None."""

    def collect(x):
        whole = x if isinstance(x, np.ndarray) else sharding.to_host(x)
        return whole if jax.process_index() == 0 else None

    return jax.tree.map(collect, params)


def _last_loss(folder: str, count: int) -> float | None:
    """The mean loss of the last `count` steps of a run. None if there are no metrics."""
    try:
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            losses = {}
            for line in f:
                try:
                    value = json.loads(line)
                    losses[value["step"]] = value["loss"]
                except (ValueError, KeyError, TypeError):  # an incomplete line
                    continue
    except OSError:
        return None
    last = [loss for _, loss in sorted(losses.items())[-count:] if np.isfinite(loss)]
    return float(np.mean(last)) if last else None
