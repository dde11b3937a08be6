"""What a FIP trainer writes for others to read: the card of its model, and the push of both to the Hub."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from huggingface_hub import HfApi

from .card import CARD_NAME, REPORT_NAME, TAGS, card_of
from .push import push_folder
from .report import report_of


class Publishing:
    """A mixin for a `Trainer`.

    Attributes:
        evaluations: what was logged of the received model and of what the last training made of it, with the
            [`moment`] that each is of.
    """

    def __init__(self, *positional, **kwargs):
        self.evaluations: list[dict[str, float | None]] = []
        self._is_as_received = True  # but for updates
        super().__init__(*positional, **kwargs)

    def log(self, logs: dict[str, float], *positional, **kwargs) -> None:
        """As the `Trainer`'s; evaluations are kept for the card."""
        if any(key.startswith("eval_") for key in logs):
            self.evaluations.append({**logs, "moment": self.moment()})
        super().log(logs, *positional, **kwargs)

    def train(self, *positional, **kwargs):
        """As the `Trainer`'s; what was measured after an earlier training is forgotten."""
        self._forget_evaluations()
        result = super().train(*positional, **kwargs)
        self._is_as_received = False
        return result

    def moment(self) -> int | None:
        """The update that the model is of (with `load_best_model_at_end` the best one's); None as it was received."""
        step, best = self.state.global_step, self.state.best_model_checkpoint
        if self._is_as_received and step == 0:
            return None
        if self.args.load_best_model_at_end and best is not None and not self.is_in_train:
            return self.state.best_global_step
        return step

    def model_changed(self) -> None:
        """To be called where the model is changed by anything but updates: what was measured of it is forgotten."""
        self._is_as_received = False
        self._forget_evaluations()

    def _forget_evaluations(self) -> None:
        self.evaluations = [row for row in self.evaluations if row["moment"] is None]

    def create_model_card(
        self, language: str | None = None, license: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md to the output folder: what was purified, how, and what was measured (`hf_fip.hub.card`).

        What the trainer logged goes into `report.json` beside it, which the card then says.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tags = [tags] if isinstance(tags, str) else tags or []
        said = {"language": language, "license": license, "tags": tags and [*TAGS, *tags]}
        report = report_of(self, {key: value for key, value in said.items() if value})
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        card_of(folder).save(folder / CARD_NAME)

    def push_to_hub(
        self,
        commit_message: str = "Purified by hf_fip",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        base_model: str | None = None,
        **card,
    ):
        """Save the model or adapter and push it with its card, in one commit; gives the commit's address.

        Args:
            blocking: wait for it; otherwise a `Future` is returned.
            token, revision, private: by default `hub_token`, `hub_revision` and `hub_private_repo` of the arguments.
            create_pr: open a pull request in place of a commit.
            base_model: Hub id of the received model, for an adapter on a model that was loaded from elsewhere.
            card: as in `create_model_card`.

        Raises:
            ValueError: the Hub refused. What was saved is whole, and can be pushed again.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        self._finish_current_push()
        args = self.args
        push = functools.partial(
            push_folder,
            args.output_dir,
            args.hub_model_id or Path(args.output_dir).absolute().name,
            token=token or args.hub_token,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
            create_pr=create_pr,
            message=commit_message,
            base_model=base_model,
        )
        return push() if blocking else HfApi().run_as_future(push)
