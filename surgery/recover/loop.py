"""The training loop: one optimiser step after the other, saved so that nothing is lost."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from surgery.disk import io_errors
from surgery.errors import TrainError
from surgery.recover.batch import Batch
from surgery.recover.checkpoints import Checkpoints
from surgery.recover.distributed import add_up_gradients, gradient_norm
from surgery.recover.figures import Curve, Figures
from surgery.recover.goal import Goal, OnLogits
from surgery.recover.guard import Guard
from surgery.recover.history import History
from surgery.recover.interrupts import Asked
from surgery.recover.kernels import use_kernels
from surgery.recover.optimise import check_eight_bit, make_optimisers
from surgery.recover.saved import Saved
from surgery.recover.schedule import decay_start, rate
from surgery.recover.selecting import keep_selection
from surgery.recover.session import Session, meter_of
from surgery.recover.state import restore, training_state

if TYPE_CHECKING:
    import torch

Told = Mapping[str, Any]
Progress = Callable[[Told], None]
Remark = Callable[[str], None]


class Loop:
    """One run, from its newest checkpoint to its end."""

    def __init__(
        self,
        session: Session,
        asked: Asked,
        progress: Progress | None = None,
        remark: Remark | None = None,
        goal: Goal | None = None,
    ) -> None:
        """Make what is needed; nothing is written before `run`.

        Args:
            goal: what is brought down; the losses of the settings by default.

        Raises:
            RecipeError, TrainError: there is no such optimiser here.
        """
        self.session, self.asked, self.progress = session, asked, progress
        self.settings, self.world = session.settings, session.world
        self.optimisers = make_optimisers(
            session.trainable.groups(self.settings),
            self.settings,
            ends=session.ends,
        )
        self.goal = OnLogits(session) if goal is None else goal
        self.guard = Guard(self.settings.spike)
        self.curve = Curve()
        self.history, self.figures = History(session, remark), Figures(session.ask.folder)
        self.first = self.settings.steps  # that the run was begun with
        self.meter = meter_of(session)
        self.checked = False  # an 8-bit optimiser, on the first gradients
        self.kernels: Mapping[str, float] | None = None  # what they computed, and torch
        self.saved_at = time.monotonic()

    def run(self) -> Curve:
        """Train to the last step, or until somebody asks to stop."""
        with self.history:
            self._begin()
            self._speed_up()
            while self.curve.step < self.settings.steps:
                if self.curve.step == decay_start(self.settings):
                    self._save(self.history.stable)
                self._note(self._step(self.curve.step))
                if self.world.agree(wish=bool(self.asked)):
                    if not self.guard.doubts:
                        self._save(self.history.newest)
                    self.curve.stopped = True
                    return self.curve
                if self._is_due():
                    self._save(self.history.newest)
            self.curve.after = self.goal.measure()
            self._save(self.history.newest)
        return self.curve

    def _step(self, step: int) -> dict[str, Any]:
        """Take one optimiser step, or skip it where the loss or gradient is out of bounds."""
        self.meter.start()
        share = rate(self.settings, step, first=self.first)
        lr = self.optimisers.set_rate(share)
        self.optimisers.zero()
        micros = list(self._micros(step))
        tokens = self.world.total(sum(batch.tokens for batch in micros))[0]
        sums: dict[str, float] = {}
        for batch in micros:
            for name, value in self._backward(batch, tokens).items():
                sums[name] = sums.get(name, 0.0) + value
        names = sorted(sums)
        totals = self.world.total(*(sums[name] for name in names))
        told = {name: value / max(tokens, 1) for name, value in zip(names, totals, strict=True)}
        add_up_gradients(self.session.held, self.world)
        self._even_out()
        self.session.trainable.before_step()
        parameters = self.session.trainable.parameters
        norm = gradient_norm(parameters.values(), self.world)
        verdict = self.guard.judge(told["loss"], norm)
        if verdict == "take":
            self._take(parameters, norm)
        elif verdict == "roll back":
            self._roll_back()
        self.curve.skipped += verdict != "take"
        self.curve.tokens += int(tokens)
        self.curve.step += 1  # after going back too: the data that led astray is passed over
        whole = self.settings.batch_rows * self.settings.context
        return {
            "step": step,
            **told,
            "lr": lr,
            "gradient_norm": norm,
            "verdict": verdict,
            "tokens": self.curve.tokens,
            **self.meter.add(whole),
        }

    def _micros(self, step: int) -> Iterator[Batch]:
        """Yield this process's share of the step's rows, as many batches as every other's."""
        size = max(self.settings.micro_tokens // self.settings.context, 1)
        size = min(size, -(-self.settings.batch_rows // self.world.size))  # work for every process
        first = step * self.settings.batch_rows
        indices = list(range(first, first + self.settings.batch_rows))
        micros = [indices[at : at + size] for at in range(0, len(indices), size)]
        for at in range(0, len(micros), self.world.size):
            own = at + self.world.rank
            chosen = micros[own] if own < len(micros) else micros[0]
            yield Batch.of(self.session.rows, chosen, self.world.device, empty=own >= len(micros))

    def _backward(self, batch: Batch, tokens: float) -> dict[str, float]:
        return self.goal.backward(batch, tokens)

    def _even_out(self) -> None:
        """Undo the scaling of what was summed here, not averaged by the shards."""
        for parameter in self.session.held:
            if parameter.grad is not None:
                parameter.grad /= self.world.size

    def _take(self, parameters: "Mapping[str, torch.nn.Parameter]", norm: float) -> None:
        self.goal.clip(parameters, norm)
        if self.settings.optimizer == "adamw8bit" and not self.checked:
            check_eight_bit(parameters.values(), self.settings)
            self.checked = True
        self.optimisers.step()
        self.session.trainable.after_step()

    def _note(self, told: dict[str, Any]) -> None:
        every, done = self.settings.eval_steps, self.curve.step
        if every and done % every == 0 and done < self.settings.steps:
            told["held_out"] = self.goal.measure()
        self.curve.losses.append(told["loss"])
        if not self.world.is_first:
            return
        self.figures.add(told)
        if self.progress:
            self.progress({**told, "steps": self.settings.steps})

    def _is_due(self) -> bool:
        """Whether to save now; all processes go by the first one's clock.

        While steps are being skipped nothing is saved: a run goes back to what was saved last.
        """
        if self.guard.doubts:
            return False
        every = self.settings.save_steps
        if every and self.curve.step % every == 0:
            return True
        late = time.monotonic() - self.saved_at > self.settings.save_seconds > 0
        return self.world.agree(wish=late and self.world.is_first)

    def _save(self, checkpoints: Checkpoints) -> None:
        curve = {"tokens": self.curve.tokens, "skipped": self.curve.skipped}
        state = training_state(
            self.session.trainable.parameters,
            self.optimisers.parts,
            self.world,
            curve={**curve, "before": self.curve.before, "details": self.goal.details},
            guard=self.guard.state(),
            plan={
                "steps": self.settings.steps,
                "decay": decay_start(self.settings),
                "first": self.first,
            },
        )
        if self.world.is_first:
            self.figures.sync()
        checkpoints.save(self.curve.step, state, tokens=self.curve.tokens)
        self.saved_at = time.monotonic()

    def _begin(self) -> None:
        """Go on where an earlier run has saved, or measure and save the beginning."""
        if not self.session.ask.resume:
            self.history.clear()
        found = self.history.find()
        self._tell_ask()
        if found is None:
            self._keep_figures(0)
            self.curve.before = self.goal.measure()
            self._save(self.history.newest)
            return
        step, saved = found
        self._restore(saved, chance=True)
        self.guard.restore(saved["guard"])
        told = saved["curve"]
        self.first = saved["plan"]["first"]
        self.curve.step, self.curve.before = step, told["before"]
        self.curve.tokens, self.curve.skipped = told["tokens"], told["skipped"]
        self.goal.details = dict(told.get("details", {}))  # runs of before there were any have none
        self._keep_figures(step)

    def _tell_ask(self) -> None:
        """Keep beside the checkpoints what was asked for and what was chosen."""
        if not self.world.is_first:
            return
        ask, session = self.session.ask, self.session
        with io_errors(ask.folder):
            (ask.folder / "settings.json").write_text(json.dumps(self.settings.as_dict(), indent=2))
            keep_selection(ask, session.selection, session.rows.data.main)

    def _restore(self, saved: Saved, *, chance: bool) -> None:
        parameters = self.session.trainable.parameters
        restore(saved, parameters, self.optimisers.parts, self.world, chance=chance)

    def _speed_up(self) -> None:
        """Take other kernels, if they compute the same on the first batch that is left."""
        if self.settings.kernels is None or self.curve.step >= self.settings.steps:
            return
        batch = next(self._micros(self.curve.step))
        self.kernels = use_kernels(
            self.session.loaded.model,
            list(self.session.trainable.parameters.values()),
            lambda: self.goal.backward(batch, batch.tokens)["loss"],
            self.world,
            half=self.session.half_precision,
        )

    def _roll_back(self) -> None:
        """Go back to the newest good weights and moments; the step and the data go on."""
        found = self.history.newest.load_newest()
        if found is None:
            raise TrainError("the run", "has to go back, and nothing was saved", "lower --lr")
        self._restore(found[1], chance=False)

    def _keep_figures(self, steps: int) -> None:
        """Keep the figures of steps that were saved; what came after is done again."""
        if self.world.is_first:
            self.curve.losses = self.figures.cut(steps)
        self.world.wait()
