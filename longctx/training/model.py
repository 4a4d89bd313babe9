"""A language model of any of the blocks, to train with Lightning.

Letters: B batch, T sequence length, D d_model, V vocab_size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longctx import blocks as own_blocks
from longctx.blocks._spec import Cost
from longctx.config import BlockRequest, Cell, parse_blocks
from longctx.engine.loading import load_block
from longctx.errors import UsageError, did_you_mean
from longctx.training.packages import LightningModule


class LongContextLM(LightningModule):
    """Embedding, L blocks, final norm, and a head that is the embedding's own weight.

    blocks: one block as `--blocks` writes it, or several that are repeated down the stack:
        `blocks=["Dense", "BLADE:chunk_size=256"], n_layers=4` gives Dense, BLADE, Dense, BLADE.
    block_options: options for those blocks of ours that have them.
    gradient_checkpointing: forward of each block is run again in backward, and only its input is kept.

    The head has no parameter of its own: `embedding.weight` is the only large one at the root, so nothing is shared
    between two modules. FSDP wraps the blocks (`FSDPStrategy(auto_wrap_policy=model.fsdp_wrap_policy())`; with
    `ModelParallelStrategy` the `configure_model` hook shards them) and leaves embedding and head to the root, whose
    weights are whole during its forward. There are no positions: the blocks are causal, and order is in that.
    """

    def __init__(
        self,
        blocks: str | Sequence[str] = "Dense",
        *,
        vocab_size: int = 256,
        d_model: int = 128,
        n_layers: int = 2,
        n_heads: int = 4,
        num_kv_heads: int | None = None,
        block_options: Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name, value in (("vocab_size", vocab_size), ("n_layers", n_layers)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name} must be a whole number of at least 1, not {value!r}")
        words = [blocks] if isinstance(blocks, str) else list(blocks)
        # As a list, and not as parse_blocks gives it: a pattern may name a block twice.
        pattern = [request for word in words for request in parse_blocks([word])]
        if not pattern:
            raise UsageError("no block is named", f"there are {', '.join(own_blocks.names())}")
        self.vocab_size, self.d_model, self.n_heads, self.num_kv_heads = vocab_size, d_model, n_heads, num_kv_heads
        self.gradient_checkpointing = gradient_checkpointing
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        _check_options(block_options or {})
        self.requests = [_with_options(pattern[index % len(pattern)], block_options or {}) for index in range(n_layers)]
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(self._build(request) for request in self.requests)
        self.norm = nn.LayerNorm(d_model)

    def _build(self, request: BlockRequest) -> nn.Module:
        # Under `with trainer.init_module()` defaults say where and in which format; ours follow them by themselves.
        if not request.is_user:
            shape = {"d_model": self.d_model, "n_heads": self.n_heads, "num_kv_heads": self.num_kv_heads}
            block = own_blocks.build(request.target, **shape, **dict(request.options))
            if not getattr(block, "causal", True):
                raise UsageError(f"{request} sees later tokens", "a language model needs causal blocks")
            return block
        cell = Cell(block=request, length=1, d_model=self.d_model, n_heads=self.n_heads, num_kv_heads=self.num_kv_heads)
        seed = int(torch.randint(1 << 31, ()))
        with torch.random.fork_rng(devices=()):
            module = load_block(request, cell, torch.get_default_device(), torch.get_default_dtype(), seed).module
        return module.train()

    # -- running --------------------------------------------------------------------------------------------------

    def forward(
        self, tokens: Tensor, states: list[Any] | None = None, *, return_states: bool | None = None
    ) -> Tensor | tuple[Tensor, list[Any]]:
        """tokens `[B, T]` -> logits `[B, T, V]`, or (logits, states) when states are given or asked for.

        states: what `init_states` or an earlier call gave; any split of a sequence over calls gives the same logits.
        """
        keep = states is not None if return_states is None else return_states
        x = self.embedding(tokens)
        kept: list[Any] = []
        for index, block in enumerate(self.blocks):
            if states is None and not keep:
                x = self._forward_block(block, x)
                continue
            y = block(x) if states is None else block(x, states[index])
            if not isinstance(y, tuple | list) or len(y) < 2:
                raise UsageError(f"block {index} ({self.requests[index]}) returns no state", "it cannot stream")
            x = y[0]
            kept.append(y[1])
        logits = self._head(x)
        return (logits, kept) if keep else logits

    def step(self, tokens: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        """One token a sequence: tokens `[B, 1]` -> (logits `[B, 1, V]`, states). The states given are consumed."""
        x = self.embedding(tokens)
        after = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block.step(x, state)
            after.append(state)
        return self._head(x), after

    def init_states(self, batch_size: int) -> list[Any]:
        """The state of every block at the start of a sequence."""
        return [block.init_state(batch_size) for block in self.blocks]

    @torch.no_grad()
    def stream(self, pieces: Sequence[Tensor] | Iterator[Tensor]) -> Iterator[Tensor]:
        """Logits of a sequence that comes in pieces `[B, t]` of any lengths, in constant memory where blocks allow."""
        states: list[Any] | None = None
        for piece in pieces:
            logits, states = self(piece, states, return_states=True)
            yield logits

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """prompt `[B, T]` -> `[B, T + max_new_tokens]`: the likeliest token each time, or drawn at a temperature."""
        was_training = self.training
        self.eval()
        try:
            logits, states = self(prompt, return_states=True)
            tokens = [prompt]
            for left in range(max_new_tokens, 0, -1):
                tokens.append(_choose(logits[:, -1], temperature, top_k, generator))
                if left > 1:
                    logits, states = self.step(tokens[-1], states)
        finally:
            self.train(was_training)
        return torch.cat(tokens, dim=1)

    def _forward_block(self, block: nn.Module, x: Tensor) -> Tensor:
        call = _without_state(block)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(call, x, use_reentrant=False)
        return call(x)

    def _head(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embedding.weight)

    # -- training -------------------------------------------------------------------------------------------------

    def loss(self, batch: Any) -> Tensor:
        """Mean cross-entropy, nats a token, of a batch: tokens `[B, T + 1]`, or a pair (inputs, targets) `[B, T]`."""
        inputs, targets = split_batch(batch)
        return F.cross_entropy(self(inputs).flatten(0, 1).float(), targets.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, sync_dist=True)

    def on_fit_start(self) -> None:
        # On a GPU a token that the embedding does not have is an assertion of the device, which says nothing of it.
        given = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", None)
        if isinstance(given, int) and given > self.vocab_size:
            raise UsageError(
                f"the data has {given} different tokens, the model a vocab_size of {self.vocab_size}",
                "give both the same vocab_size",
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; matrices decay, the embedding, biases, norms and decays of recurrences do not."""
        decayed, kept = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (decayed if parameter.dim() > 1 and "embedding" not in name else kept).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=self.learning_rate, betas=(0.9, 0.95))

    def configure_model(self) -> None:
        """Shard the blocks, then the rest, over the mesh of a `ModelParallelStrategy`; nothing without one."""
        mesh = getattr(self, "device_mesh", None)
        if mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(self, FSDPModule):
            return
        mesh = mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def fsdp_wrap_policy(self) -> set[type[nn.Module]]:
        """The classes that FSDP should wrap one by one: those of the blocks."""
        return {type(block) for block in self.blocks}

    def training_flops(self, batch_size: int, length: int) -> float | None:
        """FLOPs that forward and backward of a batch must do; None with a block that does not tell its own."""
        head = 6.0 * batch_size * length * self.d_model * self.vocab_size
        costs = [self._cost(request, batch_size, length) for request in self.requests]
        return None if any(cost is None for cost in costs) else head + sum(cost.flops for cost in costs if cost)

    def _cost(self, request: BlockRequest, batch_size: int, length: int) -> Cost | None:
        if request.is_user:
            return None
        cell = Cell(
            block=request,
            length=length,
            batch_size=batch_size,
            mode="train",
            d_model=self.d_model,
            n_heads=self.n_heads,
            num_kv_heads=self.num_kv_heads,
        )
        spec = own_blocks.load(request.target)
        return spec.cost(cell, spec.check_options(dict(request.options)))


def split_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """(inputs `[B, T]`, targets `[B, T]`) of a batch: a pair, tokens `[B, T + 1]`, or a dict with `input_ids`."""
    if isinstance(batch, Mapping):
        tokens = batch["input_ids"] if "input_ids" in batch else next(iter(batch.values()))
        return (tokens, batch["targets"]) if "targets" in batch else (tokens[:, :-1], tokens[:, 1:])
    if isinstance(batch, tuple | list):
        if len(batch) == 2:
            return batch[0], batch[1]
        batch = batch[0]
    return batch[:, :-1], batch[:, 1:]


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises UsageError for an option that no block of ours has; one of a block that is not in the stack may stand."""
    known = sorted({option for name in own_blocks.names() for option in own_blocks.load(name).defaults})
    for name in options:
        if name not in known:
            raise UsageError(
                f"no block has an option {name!r}.{did_you_mean(name, known)}", f"there are {', '.join(known)}"
            )


def _with_options(request: BlockRequest, options: Mapping[str, Any]) -> BlockRequest:
    if request.is_user or not options:
        return request
    known = own_blocks.load(request.target).defaults
    merged = {name: value for name, value in options.items() if name in known} | dict(request.options)
    return BlockRequest(target=request.target, options=tuple(sorted(merged.items())), label=request.label)


def _without_state(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """x `[B, T, D]` -> y `[B, T, D]`, no state kept."""
    takes_keep_state = "keep_state" in inspect.signature(block.forward).parameters

    def call(x: Tensor) -> Tensor:
        y = block(x, keep_state=False) if takes_keep_state else block(x)
        return y[0] if isinstance(y, tuple | list) else y

    return call


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """logits `[B, V]` -> tokens `[B, 1]`."""
    if temperature <= 0.0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
