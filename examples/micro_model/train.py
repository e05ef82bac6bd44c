"""Trains the micro model on synthetic worlds, from nothing, on two CPU cores. Run as a script; see README.md.

`--workers` processes each draw their own samples and average gradients over gloo. Progress is saved every few minutes
and taken up again from the output folder.
"""

import multiprocessing
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import typer
from torch import nn

from examples.micro_model.demonstrations import extractor_sample, player_samples
from examples.micro_model.tokenizer import END, PAD, build_tokenizer
from examples.micro_model.worlds import LETTERS, World, worlds
from oel_ray.config.precision import bfloat16_units
from oel_ray.text.chat import ChatFormat

STATE = "training.pt"
_IN_BFLOAT16 = bool(bfloat16_units())
POOL = 256
"""Samples that are drawn at a time and sorted by length."""

EMPHASIS = 8.0
"""Weight of the tokens of an answer's first line, and of what follows a letter. There it says what letters stand for:
few choices among seventy tokens, and a model of this size finds all other clues before those."""

LONG = 500
"""From so many tokens on, fused attention is faster than plain matrix products."""

ADAM_LR = 3e-3
"""Peak learning rate of embeddings and norms; matrices have `--lr`."""


class Mixture(NamedTuple):
    """Shares of samples with earlier turns, of extractions, and of plain knowledge; the rest are single boards."""

    history: float
    extraction: float
    plain: float


FIRST_LESSONS = Mixture(0.0, 0.0, 0.95)
LESSONS = Mixture(0.2, 0.15, 0.2)
LEARNED = 0.98
"""Share of the tokens under `EMPHASIS` that are right when the first lessons end. The look-up behind it comes suddenly,
after one or two million tokens; what is taught before it comes is done by other clues."""


class Progress:
    """Tokens seen so far, and when the first lessons ended. `tokens`: how many come after them."""

    def __init__(self, tokens: float, done: int = 0, first: int | None = None) -> None:
        self.tokens, self.done, self.first = tokens, done, first

    @property
    def mixture(self) -> Mixture:
        return FIRST_LESSONS if self.first is None else LESSONS

    @property
    def left(self) -> float:
        return self.tokens if self.first is None else self.first + self.tokens - self.done

    def learning_rate(self, *, warmup: float = 60e3, cooldown: float = 0.4) -> float:
        """Share of the peak: up over `warmup` tokens, flat, and down to nothing over the last `cooldown`."""
        return min(1.0, self.done / warmup, self.left / (cooldown * self.tokens))


class Shape(NamedTuple):
    """What makes a model larger or smaller: widths of the residual stream and of the inner layers, number of layers."""

    hidden: int
    mlp: int
    layers: int


def build_model(tokenizer: Any, shape: Shape, *, heads: int = 4) -> Any:
    """A Qwen3 with tied embeddings and random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        dtype=torch.float32,
    )
    return Qwen3ForCausalLM(config)


class Encoded(NamedTuple):
    """A sample as ids, and the weight of each as a target."""

    ids: list[int]
    weights: list[float]


def draw(rng: random.Random, known: list[World], chat: ChatFormat, mixed: Mixture) -> list[Encoded]:
    """A sample of the mixture, or two of the same prompt."""
    world, kind = rng.choice(known), rng.random()
    if kind < mixed.extraction:
        sample = extractor_sample(world, rng)
        return [_encoded(chat, chat.message_ids(sample.situation), sample.answer)]
    history, plain = kind < mixed.extraction + mixed.history, rng.random() < mixed.plain
    samples = player_samples(world, rng, history=history, plain=plain)
    prompt = chat.game_ids(samples[0].situation, samples[0].knowledge or "")
    return [_encoded(chat, prompt, sample.answer) for sample in samples]


def _encoded(chat: ChatFormat, prompt: list[int], answer: str) -> Encoded:
    first, after = (
        chat.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text in re.split(r"(?=\n)", answer, maxsplit=1)
    )
    letters = set(chat.tokenizer.convert_tokens_to_ids([f" {letter}" for letter in LETTERS]))
    behind = [EMPHASIS if before in letters else 1.0 for before in [0, *after]]
    ids = [*prompt, *first, *after, chat.tokenizer.eos_token_id]
    return Encoded(ids, [0.0] * len(prompt) + [EMPHASIS] * len(first) + behind)


def batches(
    rng: random.Random, chat: ChatFormat, budget: int, progress: Progress
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of at most `budget` tokens with padding: ids [B, T] and the weight [B, T] of each as a target."""
    known = worlds("train")
    while True:
        drawn = [draw(rng, known, chat, progress.mixture) for _ in range(POOL)]
        pool = sorted(drawn, key=_longest)
        cuts: list[list[Encoded]] = [[]]
        for samples in pool:
            if (len(cuts[-1]) + len(samples)) * _longest(samples) > budget:
                cuts.append([])
            cuts[-1] += samples
        rng.shuffle(cuts)
        yield from (_padded(cut, chat.tokenizer.pad_token_id) for cut in cuts if cut)


def _longest(samples: list[Encoded]) -> int:
    return max(len(sample.ids) for sample in samples)


def _padded(samples: list[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = _longest(samples)
    ids_BT = torch.tensor([sample.ids + [pad] * (longest - len(sample.ids)) for sample in samples])
    weights_BT = torch.zeros(ids_BT.shape)
    for row, sample in enumerate(samples):
        weights_BT[row, : len(sample.ids)] = torch.tensor(sample.weights)
    return ids_BT, weights_BT


class Tally(NamedTuple):
    """The loss, and the shares of all tokens and of those that weigh more that are predicted right."""

    loss: float
    right: float
    right_heavy: float


def loss_of(model: Any, ids_BT: torch.Tensor, weights_BT: torch.Tensor) -> tuple[torch.Tensor, Tally]:
    """Weighted mean of the cross-entropy of the answers' tokens, in nats, and what is predicted right.

    Padding stands on the right, where causal attention never looks: no attention mask is needed.
    """
    model.set_attn_implementation("sdpa" if ids_BT.shape[1] > LONG else "eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=_IN_BFLOAT16):
        hidden_BTD = model.model(input_ids=ids_BT).last_hidden_state
        learned_BT = weights_BT[:, 1:] > 0
        hidden_ND = hidden_BTD[:, :-1][learned_BT]
        logits_NV = model.lm_head(hidden_ND).float()
    targets_N, weights_N = ids_BT[:, 1:][learned_BT], weights_BT[:, 1:][learned_BT]
    losses_N = nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    right_N = (logits_NV.argmax(-1) == targets_N).float()
    loss = torch.dot(losses_N, weights_N) / weights_N.sum()
    return loss, Tally(loss.item(), right_N.mean().item(), right_N[weights_N > 1].mean().item())


class Optimizers:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
        self.all: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, ns_steps=4),
            torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._peaks = [lr, ADAM_LR]

    def step(self, share: float) -> None:
        for optimizer, peak in zip(self.all, self._peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()


def train(
    out: Annotated[Path, typer.Option(help="Folder of the model; training goes on from what lies there.")],
    tokens: Annotated[
        float, typer.Option(help="Tokens to train on after the first lessons, prompts and padding included.")
    ] = 8e6,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the matrices (Muon).")] = 6e-3,
    budget: Annotated[int, typer.Option(help="Tokens of a batch, over all workers.")] = 6000,
    workers: Annotated[int, typer.Option(help="Processes; one per core.")] = 2,
    seed: Annotated[int, typer.Option(help="Of weights and samples.")] = 0,
    minutes: Annotated[float, typer.Option(help="Stop and save after so long.")] = 110.0,
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 192,
    mlp: Annotated[int, typer.Option(help="Width inside a layer.")] = 640,
    layers: Annotated[int, typer.Option(help="Layers.")] = 4,
) -> None:
    """Train the micro model."""
    out.mkdir(parents=True, exist_ok=True)
    arguments = (workers, out, Shape(hidden, mlp, layers), tokens, lr, budget, seed, minutes)
    processes = [multiprocessing.Process(target=_worker, args=(rank, *arguments)) for rank in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    raise typer.Exit(max(abs(process.exitcode or 0) for process in processes))


def _worker(
    rank: int, workers: int, out: Path, shape: Shape, tokens: float, lr: float, budget: int, seed: int, minutes: float
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    store = f"file://{(out / '.store').absolute()}"
    (out / ".store").unlink(missing_ok=True) if rank == 0 else time.sleep(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
    torch.manual_seed(seed)
    chat = ChatFormat(build_tokenizer(), thinking=True)
    model = build_model(chat.tokenizer, shape)
    optimizers = Optimizers(model, lr)
    progress, step = _load(out, model, optimizers, tokens)
    parameters = list(model.parameters())
    rng = random.Random(f"{seed} {rank} {step}")
    stream = batches(rng, chat, budget // workers, progress)
    began = since = saved = time.monotonic()
    counted, sums = 0, [0.0] * len(Tally._fields)
    while progress.left > 0:
        ids_BT, weights_BT = next(stream)
        loss, tally = loss_of(model, ids_BT, weights_BT)
        torch.autograd.backward(loss)
        flat = torch.cat([p.grad.flatten() for p in parameters] + [torch.tensor([ids_BT.numel(), *tally])])
        dist.all_reduce(flat)
        size, *tallies = flat[-1 - len(tally) :].tolist()
        offset = 0
        for p in parameters:
            p.grad.copy_((flat[offset : offset + p.numel()] / workers).view_as(p))
            offset += p.numel()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers.step(progress.learning_rate())
        progress.done, step, counted = progress.done + int(size), step + 1, counted + int(size)
        sums = [before + new / workers for before, new in zip(sums, tallies, strict=True)]
        if step % 50 == 0:
            now, mean = time.monotonic(), Tally(*(value / 50 for value in sums))
            if rank == 0:
                print(
                    f"step {step}  {progress.done / 1e6:.2f}M tokens  {counted / (now - since):.0f}/s  "
                    f"loss {mean.loss:.4f}  right {mean.right:.4f}  heavy {mean.right_heavy:.4f}",
                    flush=True,
                )
            if progress.first is None and mean.right_heavy >= LEARNED:
                progress.first = progress.done
            since, counted, sums = now, 0, [0.0] * len(sums)
            stop = torch.tensor([float(now - began > minutes * 60), float(now - saved > 240)])
            dist.broadcast(stop, 0)
            if stop.any():
                saved = now
                _save(rank, out, model, optimizers, chat, progress, step)
            if stop[0]:
                break
    _save(rank, out, model, optimizers, chat, progress, step)
    dist.destroy_process_group()


def _load(out: Path, model: Any, optimizers: Optimizers, tokens: float) -> tuple[Progress, int]:
    if not (out / STATE).exists():
        return Progress(tokens), 0
    state = torch.load(out / STATE, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, values in zip(optimizers.all, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    return Progress(tokens, state["tokens"], state["first"]), state["step"]


def _save(
    rank: int, out: Path, model: Any, optimizers: Optimizers, chat: ChatFormat, progress: Progress, step: int
) -> None:
    if rank:
        return
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers.all],
        "tokens": progress.done,
        "first": progress.first,
        "step": step,
    }
    torch.save(state, out / f"{STATE}.new")
    (out / f"{STATE}.new").rename(out / STATE)
    model.save_pretrained(out)
    chat.tokenizer.save_pretrained(out)


if __name__ == "__main__":
    typer.run(train)
