"""Trains the micro model on synthetic worlds, from nothing, on two CPU cores. Run as a script; see README.md.

`--workers` processes each draw their own samples and average gradients over gloo. Progress is saved every few minutes
and taken up again from the output folder.
"""

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import typer
from torch import nn

from examples.micro_model.demonstrations import extractor_sample, player_sample
from examples.micro_model.tokenizer import END, PAD, build_tokenizer
from examples.micro_model.worlds import World, worlds
from oel_ray.chat import ChatFormat

STATE = "training.pt"
POOL = 256
"""Samples that are drawn at a time and sorted by length."""

ADAM_LR = 3e-3
"""Peak learning rate of embeddings and norms; matrices have `--lr`."""


class Mixture(NamedTuple):
    """Shares of samples with earlier turns and of extractions; the rest are single boards."""

    history: float
    extraction: float


def mixture(progress: float) -> Mixture:
    """Single boards first, then everything. `progress` goes from 0 to 1."""
    if progress < 0.2:
        return Mixture(0.0, 0.0)
    return Mixture(0.2, 0.12)


def build_model(tokenizer: Any, *, hidden: int = 192, layers: int = 4, heads: int = 4, mlp: int = 512) -> Any:
    """A Qwen3 with tied embeddings and random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        attn_implementation="eager",
        dtype=torch.float32,
    )
    return Qwen3ForCausalLM(config)


class Encoded(NamedTuple):
    """A sample as ids; the answer, which is learned, starts at `start`."""

    ids: list[int]
    start: int


def draw(rng: random.Random, known: list[World], chat: ChatFormat, mixed: Mixture) -> Encoded:
    """One sample of the mixture."""
    world, kind = rng.choice(known), rng.random()
    if kind < mixed.extraction:
        sample = extractor_sample(world, rng)
        prompt = chat.message_ids(sample.situation)
    else:
        sample = player_sample(world, rng, history=kind < mixed.extraction + mixed.history)
        prompt = chat.game_ids(sample.situation, sample.knowledge or "")
    answer: list[int] = chat.tokenizer(sample.answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return Encoded([*prompt, *answer, chat.tokenizer.eos_token_id], len(prompt))


def batches(
    rng: random.Random, chat: ChatFormat, budget: int, progress: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of at most `budget` tokens with padding: ids [B, T] and a mask [B, T] of what is learned."""
    known = worlds("train")
    while True:
        pool = sorted((draw(rng, known, chat, mixture(progress())) for _ in range(POOL)), key=lambda x: len(x.ids))
        cuts: list[list[Encoded]] = [[]]
        for sample in pool:
            if (len(cuts[-1]) + 1) * len(sample.ids) > budget:
                cuts.append([])
            cuts[-1].append(sample)
        rng.shuffle(cuts)
        yield from (_padded(cut, chat.tokenizer.pad_token_id) for cut in cuts if cut)


def _padded(samples: list[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(sample.ids) for sample in samples)
    ids_BT = torch.tensor([sample.ids + [pad] * (longest - len(sample.ids)) for sample in samples])
    mask_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        mask_BT[row, sample.start : len(sample.ids)] = True
    return ids_BT, mask_BT


def loss_of(model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answers' tokens, in nats, and the share that is predicted right.

    Padding stands on the right, where causal attention never looks: no attention mask is needed.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_BTD = model.model(input_ids=ids_BT).last_hidden_state
        hidden_ND = hidden_BTD[:, :-1][mask_BT[:, 1:]]
        logits_NV = model.lm_head(hidden_ND).float()
    targets_N = ids_BT[:, 1:][mask_BT[:, 1:]]
    right = (logits_NV.argmax(-1) == targets_N).float().mean()
    return nn.functional.cross_entropy(logits_NV, targets_N), right


def learning_rate(progress: float, *, warmup: float = 0.01, cooldown: float = 0.3) -> float:
    """Share of the peak: up, flat, and down to nothing over the last `cooldown`."""
    return min(1.0, progress / warmup, (1 - progress) / cooldown)


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
    tokens: Annotated[float, typer.Option(help="Tokens to train on, prompts and padding included.")] = 8e6,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the matrices (Muon).")] = 6e-3,
    budget: Annotated[int, typer.Option(help="Tokens of a batch, over all workers.")] = 8000,
    workers: Annotated[int, typer.Option(help="Processes; one per core.")] = 2,
    seed: Annotated[int, typer.Option(help="Of weights and samples.")] = 0,
    minutes: Annotated[float, typer.Option(help="Stop and save after so long.")] = 110.0,
) -> None:
    """Train the micro model."""
    out.mkdir(parents=True, exist_ok=True)
    arguments = (workers, out, tokens, lr, budget, seed, minutes)
    processes = [multiprocessing.Process(target=_worker, args=(rank, *arguments)) for rank in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    raise typer.Exit(max(abs(process.exitcode or 0) for process in processes))


def _worker(
    rank: int, workers: int, out: Path, tokens: float, lr: float, budget: int, seed: int, minutes: float
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    store = f"file://{(out / '.store').absolute()}"
    (out / ".store").unlink(missing_ok=True) if rank == 0 else time.sleep(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
    torch.manual_seed(seed)
    chat = ChatFormat(build_tokenizer(), thinking=True)
    model = build_model(chat.tokenizer)
    optimizers = Optimizers(model, lr)
    done, step = _load(out, model, optimizers)
    parameters = list(model.parameters())
    rng = random.Random(f"{seed} {rank} {step}")
    stream = batches(rng, chat, budget // workers, lambda: done / tokens)
    began, since, counted, losses, rights = time.monotonic(), time.monotonic(), 0, 0.0, 0.0
    saved = began
    while done < tokens:
        ids_BT, mask_BT = next(stream)
        loss, right = loss_of(model, ids_BT, mask_BT)
        torch.autograd.backward(loss)
        flat = torch.cat(
            [p.grad.flatten() for p in parameters] + [torch.tensor([ids_BT.numel(), loss.detach(), right])]
        )
        dist.all_reduce(flat)
        size, loss_sum, right_sum = flat[-3:].tolist()
        offset = 0
        for p in parameters:
            p.grad.copy_((flat[offset : offset + p.numel()] / workers).view_as(p))
            offset += p.numel()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers.step(learning_rate(done / tokens))
        done, step, counted = done + int(size), step + 1, counted + int(size)
        losses, rights = losses + loss_sum / workers, rights + right_sum / workers
        if step % 50 == 0:
            now = time.monotonic()
            if rank == 0:
                print(
                    f"step {step}  {done / 1e6:.2f}M tokens  {counted / (now - since):.0f}/s  "
                    f"loss {losses / 50:.4f}  right {rights / 50:.4f}",
                    flush=True,
                )
            since, counted, losses, rights = now, 0, 0.0, 0.0
            stop = torch.tensor([float(now - began > minutes * 60), float(now - saved > 240)])
            dist.broadcast(stop, 0)
            if stop.any() or done >= tokens:
                saved = now
                _save(rank, out, model, optimizers, chat, done, step)
            if stop[0]:
                break
    _save(rank, out, model, optimizers, chat, done, step)
    dist.destroy_process_group()


def _load(out: Path, model: Any, optimizers: Optimizers) -> tuple[int, int]:
    if not (out / STATE).exists():
        return 0, 0
    state = torch.load(out / STATE, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, values in zip(optimizers.all, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    return state["tokens"], state["step"]


def _save(rank: int, out: Path, model: Any, optimizers: Optimizers, chat: ChatFormat, done: int, step: int) -> None:
    if rank:
        return
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers.all],
        "tokens": done,
        "step": step,
    }
    torch.save(state, out / f"{STATE}.new")
    (out / f"{STATE}.new").rename(out / STATE)
    model.save_pretrained(out)
    chat.tokenizer.save_pretrained(out)


if __name__ == "__main__":
    typer.run(train)
