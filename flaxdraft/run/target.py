"""A run's target: its files, configuration and tokenizer first, its weights only for those who compute with them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from flaxdraft import targets
from flaxdraft.data.chat_template import ChatTemplate, now
from flaxdraft.data.documents import Documents
from flaxdraft.devices.sharding import Sharding
from flaxdraft.errors import InputError
from flaxdraft.nn.precision import of_both
from flaxdraft.progress import CONSOLE
from flaxdraft.run.given import open_given
from flaxdraft.run.planned_target import tapped_config
from flaxdraft.run.saying import say
from flaxdraft.run.setup import Setup
from flaxdraft.serving.trained_draft import AboutTarget
from flaxdraft.targets.decoder import DecoderConfig, abstract_state, bytes_per_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class RunTarget:
    """Each part is read when it is first asked for, and once; the weights again where they were given back."""

    def __init__(self, setup: Setup):
        self._setup, self._wanted = setup, setup.config.target
        self._loaded: targets.LoadedTarget | None = None

    @functools.cached_property
    def opened(self) -> targets.OpenedTarget:
        """The files."""
        say("target", self._wanted.path)
        return targets.open_target(self._wanted.path, self._wanted.sha256)

    @functools.cached_property
    def config(self) -> DecoderConfig:
        """
        Raises:
            InputError: see `tapped_config`; the mesh does not divide it.
        """
        c = tapped_config(self._setup, self.opened)
        CONSOLE.print(
            f"  {c.num_hidden_layers} layers, width {c.hidden_size}, vocabulary {c.vocab_size}, "
            f"taps after layers {', '.join(map(str, c.tap_layers))}"
        )
        self._check_mesh(c)
        return c

    @property
    def about(self) -> AboutTarget:
        """What an export asks of it."""
        return AboutTarget(self.opened.hf_config, self.config.tap_layers)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """
        Raises:
            InputError: there is none, or it has no chat template.
        """
        return self.opened.needed_tokenizer(with_template=True)

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """What the chat template is given beside conversations.

        Raises:
            InputError: it knows no such argument.
        """
        data = self._setup.config.data
        template = ChatTemplate(data.template, data.date or now())
        template.check(self.tokenizer, "data.template")
        return template

    @functools.cached_property
    def given(self) -> Documents | None:
        """See `open_given`. A file takes long to read: what answers need, too, is asked for before.

        Raises:
            InputError: no token ends an answer.
        """
        config, template = self.config, self.template
        self.opened.needed_stop_tokens()
        return open_given(self._setup.config, self.opened, config, template)

    @property
    def loaded(self) -> targets.LoadedTarget:
        """All of it, over its mesh: the one copy of the run, loaded where it is not there. All processes of the run
        must ask for it."""
        if self._loaded is None:
            _ = self.config, self.tokenizer  # refuse what does not go together before gigabytes are read
            precision = of_both(self._setup.target_dtype)
            self._loaded = targets.load_target(
                self.opened, tap_layers=self.config.tap_layers, precision=precision, mesh=self._setup.target_mesh
            )
        return self._loaded

    def release(self) -> None:
        """Gives its memory back. Whoever asks for it again has it loaded again."""
        self._loaded = None

    def _check_mesh(self, config: DecoderConfig) -> None:
        """
        Raises:
            InputError: the mesh does not divide it.
        """
        setup, mesh = self._setup, self._setup.target_mesh
        if mesh is None:
            return
        precision = of_both(setup.target_dtype)
        groups = self.opened.family.groups(config, precision, Sharding.none())
        try:
            held = bytes_per_device(config, abstract_state(config, groups, precision)[1], mesh.shape)
        except InputError as error:
            raise InputError(f"target.{error} (target.mesh is the run's mesh where it is left out)") from error
        axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
        CONSOLE.print(f"  {held / 1e9:.2f} GB of {setup.target_dtype} weights a device ({axes})")
