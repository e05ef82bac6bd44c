"""Train on one rank: take responses, compute, step, send weights. Runs in every worker of the Ray Train group.

Rank 0 writes the metrics and samples files, the group's only output besides the policy folder.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from oel_ray.consolidate.attempts import Attempt
from oel_ray.consolidate.job import Job
from oel_ray.consolidate.prefixes import Draw
from oel_ray.consolidate.responses import Responses
from oel_ray.distill.batches import Sample, micro_batches
from oel_ray.distill.build import build_step
from oel_ray.distill.gather import check_names, weights_of
from oel_ray.distill.step import DistillStep, StepMetrics
from oel_ray.errors import RunFailed
from oel_ray.faults import fault_point
from oel_ray.formats import as_text
from oel_ray.records import Generation, SampleRow, StepRow, append_jsonl
from oel_ray.runs.layout import CONSOLIDATE, RoundFiles
from oel_ray.seeds import derive_seed
from oel_ray.telemetry.series import enter, log
from oel_ray.text.chat import ChatFormat
from oel_ray.weights.export import export_policy


def train(job: Job) -> None:
    """Do all steps of a round after the checkpoint, and write the new policy. Collective over the ranks of the group.

    Raises:
        UserError: the model cannot be trained: its logits are not a linear function of its last hidden state, or its
            tensors have other names in transformers than in the checkpoint.
        RunFailed: a response came from weights other than the student's, or too many steps in a row had a loss or
            gradient that was not finite.
    """
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = _claim_device(job, context.get_local_rank())
    enter(job.round, CONSOLIDATE)
    attempt = Attempt(job, rank, world_size)
    step = build_step(
        job.config.consolidate,
        job.policy,
        job.teacher,
        device,
        trained=attempt.weights,
        adapter_seed=derive_seed(job.config.seed, "lora", job.round),
    )
    attempt.restore(step)
    weights = weights_of(step.student, getattr(torch, job.config.policy_dtype), job.policy)
    check_names(weights, job.policy)
    sync = attempt.weight_sync(weights)
    chat = ChatFormat.from_pretrained(job.policy, thinking=job.config.thinking, frame=job.frame)
    head = len(chat.game_prefix_ids())
    knowledge_ids = [tuple(chat.game_prefix_ids(text.text)) for text in job.knowledge]

    responses = Responses(job, head, knowledge_ids, rank, world_size)
    served, skipped = attempt.serve(sync), 0
    responses.ask(attempt.first_step, served)
    for number, draws in list(enumerate(job.plan))[attempt.first_step :]:
        started = time.monotonic()
        made_by, generations = responses.take(number)
        generated = time.monotonic()
        if responses.ahead:
            responses.ask(number + 1, served)
        samples = [
            Sample(
                id=job.prefixes[draw.prefix].id,
                student_prompt_ids=job.prefixes[draw.prefix].prompt_ids,
                head=head,
                knowledge_ids=knowledge_ids[draw.knowledge],
                response_ids=generation.token_ids,
            )
            for draw, generation in zip(draws, generations, strict=True)
        ]
        fault_point(f"{job.round}:consolidate:{number}:rank-{rank}:attempt-{attempt.number}")
        with _profiler(job, number, rank):
            metrics, retried = _train_step(job, step, samples, rank, world_size)
        trained = time.monotonic()
        skipped = 0 if metrics.applied else skipped + 1
        version = attempt.version(number + 1)
        waited = trained
        if not responses.by_teacher:
            responses.wait(number + 1)  # the weights must not change during a request
            waited = time.monotonic()
            sync.send(version)
            dist.barrier()  # no rank asks for the next responses before all engines serve the new weights
            served = version
        if not responses.ahead:
            responses.ask(number + 1, served)
        costs = {
            "seconds_generate": generated - started + waited - trained,
            "seconds_train": trained - generated,
            "seconds_sync": time.monotonic() - waited,
            "sync_bytes": 0 if responses.by_teacher else sync.nbytes,
            **{f"teacher_{name}": count for name, count in asdict(step.teacher.caches.counts).items()},
        }
        if rank == 0:
            labels = {"generated_by": made_by, "weight_version": version}
            _record(job, number, draws, generations, metrics, retried | costs | labels)
        if skipped > job.config.consolidate.max_skipped_steps:
            attempt.save_last_good(number + 1 - skipped, step)
            raise RunFailed(f"loss or gradient was not finite in {skipped} steps in a row, up to step {number}")
        if number + 1 in job.config.consolidate.keep_steps:  # before the checkpoint, which would not do it again
            export_policy(weights, job.policy, RoundFiles(job.target.parent).policy_after(number + 1))
        if not skipped and attempt.due(number + 1):  # so that the newest checkpoint has the last good weights
            attempt.save(number + 1, step)
    export_policy(weights, job.policy, job.target)


def _record(
    job: Job,
    number: int,
    draws: Sequence[Draw],
    generations: Sequence[Generation],
    metrics: StepMetrics,
    rest: Mapping[str, Any],
) -> None:
    """Write the samples of a step and then its metrics. `rest` holds further columns of the metrics."""
    measured = asdict(metrics)
    kl_by_sample = measured.pop("kl_by_sample")
    row = StepRow(step=number, samples=len(draws), **measured, **rest)
    samples = [
        SampleRow(
            step=number,
            prefix_id=job.prefixes[draw.prefix].id,
            knowledge_id=job.knowledge[draw.knowledge].id,
            response=generation.text,
            response_ids=generation.token_ids,
            kl=kl_by_sample[job.prefixes[draw.prefix].id],
            weight_version=generation.weight_version,
        )
        for draw, generation in zip(draws, generations, strict=True)
    ]
    append_jsonl(job.samples, *samples)
    append_jsonl(job.metrics, row)
    log.info("step %d: KL %s, %s", row.step, as_text(row.kl_per_token, ".4f"), "applied" if row.applied else "skipped")


def _train_step(
    job: Job, step: DistillStep, samples: Sequence[Sample], rank: int, world_size: int
) -> tuple[StepMetrics, dict[str, int]]:
    """Do a step, and retry it with half as large micro-batches if memory ran out."""
    tokens, loss_mean = job.config.consolidate.micro_batch_tokens, job.config.consolidate.loss_mean
    for retries in range(2):
        share = micro_batches(
            samples, rank, world_size, max(tokens >> retries, 1), loss_mean=loss_mean, packed=step.packs
        )
        if metrics := step.step(share):
            return metrics, {"memory_retries": retries}
    raise RunFailed(f"{step.shortage} (and so it did with micro-batches twice as large)")


def _profiler(job: Job, step: int, rank: int) -> AbstractContextManager[Any]:
    """Return a profiler for a configured step on rank 0, and a context that does nothing otherwise."""
    if rank or step not in job.config.consolidate.profile_steps:
        return nullcontext()
    done = torch.profiler.tensorboard_trace_handler(str(job.profile), f"round-{job.round:03d}-step-{step:04d}")
    return torch.profiler.profile(on_trace_ready=done)


def _claim_device(job: Job, local_rank: int) -> torch.device:
    """Claim the rank's GPU, or a CPU core of its own, because two ranks on one core would halve their speed."""
    if job.on_gpu:
        device: torch.device = ray.train.torch.get_device()
        return device
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[local_rank % len(cores)]})
    torch.set_num_threads(1)
    return torch.device("cpu")
