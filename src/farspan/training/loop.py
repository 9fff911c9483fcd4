"""The training loop: set up, then read, step, evaluate and save until the length of the recipe is reached.

One optimiser step reads M micro-batches, of which n tokens in all have a label:

    loss = Σ over micro-batches and labels of -log p(label) / n

so accumulation (and the sum over ranks) gives the gradient of one large batch, whatever each micro-batch holds. Weights
and optimiser are float32; with bf16 the matrix products run under autocast.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from farspan.data.dataset import PreparedDataset
from farspan.data.loader import make_loader
from farspan.errors import CheckpointError
from farspan.evaluation.environment import processor, versions
from farspan.evaluation.loading import import_modules, read_run
from farspan.evaluation.perplexity import bits_per_byte
from farspan.nn.feed_forward import AuxiliaryRecord
from farspan.nn.losses import IGNORE_INDEX
from farspan.training.checkpoint import Checkpointer, Progress, is_disk_full, restore_rng
from farspan.training.guard import NonFiniteError, broken_weight, check_finite, way_out
from farspan.training.interrupt import StopRequest
from farspan.training.logs import Display, MetricsLog, TensorBoard, duration, peak_flops, quantity
from farspan.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from farspan.training.parallel import Parallel
from farspan.training.recipe import Recipe, TrainRecipe
from farspan.training.report import write_report
from farspan.training.run import Resume, Run, export_model, open_run, write_run
from farspan.training.setup import (
    build_model,
    check_model,
    choose_precision,
    compile_model,
    open_data,
    recompute_activations,
    seed_everything,
)


def train(recipe: Recipe, *, resume: Resume = "auto", command: str = "") -> Path:
    """Runs a recipe to its end, from where its run directory stands.

    The same call on the same directory resumes after Ctrl-C, a crash or `kill -9`: the log then holds the same losses,
    digit by digit, as if nothing had happened (on the same machine, versions and number of threads). A finished run is
    left as it is. See `farspan.training.run.open_run` for the rules.

    Args:
        recipe: What to train.
        resume: "auto" starts or resumes, "must" only resumes, "never" moves an earlier run aside and starts.
        command: The command line, recorded in run.json.

    Returns:
        The run directory, which is a model directory now.

    Raises:
        FarspanError: Anything that the user can mend: configuration, data, checkpoints, a full disk, a loss that is not
            a number. Complete checkpoints stay intact.
    """
    recipe.validate()
    import_modules(recipe.imports)
    parallel = Parallel.start()
    try:
        with open_run(recipe, resume) as run:
            display = Display(recipe.logging.progress, recipe.logging.logging_steps)
            display.message(run.note)
            if not run.finished:
                _run(recipe, run, parallel, display, command)
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        raise CheckpointError(
            f"no space left on the disk of {str(recipe.run_dir)!r}. Complete checkpoints are intact: free some space "
            "and run the same command again to resume."
        ) from error
    finally:
        parallel.close()
    return run.directory


def _run(recipe: Recipe, run: Run, parallel: Parallel, display: Display, command: str) -> None:
    """Everything between opening the run directory and leaving it."""
    settings, device = recipe.train, parallel.device
    total, tokens_per_step = recipe.total_steps(parallel.world_size), recipe.tokens_per_step(parallel.world_size)

    # Data and model.
    seed_everything(settings.seed)
    check_model(recipe)
    earlier = read_run(run.directory) if run.checkpoint else {}
    dataset = open_data(recipe, run, earlier.get("corpus", {}).get("fingerprint"))
    tokenizer = dataset.load_tokenizer()
    model: Any = parallel.shard(build_model(recipe, tokenizer))
    if settings.gradient_checkpointing:
        recompute_activations(model)
    if settings.torch_compile:
        compile_model(model)
    optimizer = build_optimizer(model, settings)
    precision = choose_precision(settings.precision, device)
    loader = make_loader(
        dataset,
        "train",
        sequence_length=recipe.data.sequence_length,
        batch_size=settings.per_device_train_batch_size,
        seed=settings.seed,
        rank=parallel.rank,
        world_size=parallel.world_size,
        separate_documents=recipe.data.separate_documents,
    )

    # What a step costs: a backward pass is two forward passes. Recomputing activations is one more, which the device
    # does but the model has no use for: it counts as work, not as utilisation.
    useful = 3 * model.flops_per_token(recipe.data.sequence_length) * tokens_per_step
    work = useful * 4 / 3 if settings.gradient_checkpointing else useful
    peak = peak_flops(device, precision)

    # Where we are.
    progress = Progress()
    checkpointer = Checkpointer(run.checkpoints, recipe.checkpoint.save_total_limit, parallel)
    checkpointer.sweep()
    if run.checkpoint:
        progress, rank_state = checkpointer.load(run.checkpoint, model, optimizer)
        loader.load_state_dict(rank_state["loader"])
        batches = iter(loader)
        restore_rng(rank_state["rng"])  # only now: making the iterator draws from the global generator
    else:
        batches = iter(loader)

    about = _describe(recipe, run, dataset, model, device, precision, command)
    changed = [
        name for name in ("versions", "device", "threads", "precision") if earlier.get(name, about[name]) != about[name]
    ]
    if changed:
        display.message(f"note: other {', '.join(changed)} than before; digits may differ from an uninterrupted run")
    write_run(run.directory, about)
    log = MetricsLog(run.metrics, after_step=progress.step)
    if log.missing:
        display.message(f"note: {run.metrics} lacks {log.missing} of the {progress.step} steps before; it goes on here")
    board = TensorBoard(run.directory / "tensorboard" if recipe.logging.tensorboard else None, progress.step)
    display.message(
        f"{quantity(about['parameters'])} parameters, {quantity(dataset.metadata.splits['train'].tokens)} training "
        f"tokens, {total} steps of {tokens_per_step} tokens, {about['precision']} on {about['device']}"
    )

    def evaluate(kind: str, max_windows: int | None) -> float:
        found = bits_per_byte(
            model,
            dataset.documents("valid"),
            window=recipe.data.sequence_length,
            end_of_document=dataset.metadata.end_of_document,
            batch_tokens=recipe.evaluation.batch_tokens,
            max_windows=max_windows,
            dtype=precision if precision == torch.bfloat16 else None,
        )
        numbers = {"bits_per_byte": found.bits_per_byte, "perplexity": found.perplexity, "windows": found.windows}
        row = {"kind": kind, "step": progress.step, **numbers}
        log.write(row)
        board.write(row)
        return found.bits_per_byte

    with contextlib.ExitStack() as closing:
        for part in (checkpointer, display, board, log):  # closed in reverse order, also on errors
            closing.callback(part.close)

        display.start(total, progress.step)
        with StopRequest() as stop:
            while progress.step < total and stop.name is None:
                started = time.perf_counter()
                rate = learning_rate(progress.step, settings, total)
                set_learning_rate(optimizer, rate)
                micro_batches = [_on(device, next(batches)) for _ in range(settings.gradient_accumulation_steps)]
                try:
                    loss, grad_norm, routers = optimizer_step(
                        model, optimizer, micro_batches, settings, precision, parallel, step=progress.step + 1
                    )
                except NonFiniteError as error:
                    broken = bool(broken_weight(model))
                    if not broken:
                        export_model(run.directory, model, tokenizer)
                    advice = way_out(str(run.directory), recipe.model.preset, broken)
                    raise NonFiniteError(f"{error} {advice}") from None
                seconds = time.perf_counter() - started
                progress.step += 1
                progress.tokens += tokens_per_step
                progress.seconds += seconds

                row = {
                    "kind": "train",
                    "step": progress.step,
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "learning_rate": rate,
                    "tokens": progress.tokens,
                    "seconds": round(progress.seconds, 4),
                    "tokens_per_second": round(tokens_per_step / seconds, 1),
                    "flops_per_second": round(work / seconds),
                }
                row |= {name: value for name, value in routers.items() if name not in row}
                if peak is not None:
                    row["mfu"] = useful / seconds / (peak * parallel.world_size)
                log.write(row)
                if progress.step % recipe.logging.logging_steps == 0:
                    board.write(row)
                display.step(row, seconds_left=progress.seconds / progress.step * (total - progress.step))

                if _due(progress.step, recipe.evaluation.eval_steps) and progress.step < total:
                    bits = evaluate("evaluation", recipe.evaluation.max_windows)
                    display.message(f"step {progress.step:>6}/{total}  valid {bits:.4f} bits per byte")
                if _due(progress.step, recipe.checkpoint.save_steps):
                    checkpointer.save(progress, model, optimizer, loader)
                checkpointer.poll()

        display.close()

        # The last step is always saved, so that a crash from here on costs no training.
        checkpointer.save(progress, model, optimizer, loader)
        about |= {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 1)}
        if stop.name is None:
            display.message("evaluating on the whole valid split")
            about["bits_per_byte"] = evaluate("final", None)
        checkpointer.wait()
        export_model(run.directory, model, tokenizer)
        write_run(run.directory, about)
        report = write_report(run.directory)

    if stop.name is None:
        write_run(run.directory, {**about, "finished": True})
        spent = duration(progress.seconds)
        display.message(f"finished: {total} steps in {spent}, valid {about['bits_per_byte']:.4f} bits per byte")
        display.message(f"model {run.directory}, report {report}")
    else:
        display.message(
            f"stopped by {stop.name} after step {progress.step} of {total}; everything is saved in {run.directory}. "
            "Run the same command again to resume."
        )


def optimizer_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[dict[str, Tensor]],
    settings: TrainRecipe,
    precision: torch.dtype,
    parallel: Parallel,
    step: int,
) -> tuple[float, float, dict[str, float]]:
    """One optimiser step over several micro-batches, equal to one over all of them at once.

    Args:
        model: A causal language model (the forward contract of `FarspanForCausalLM`).
        optimizer: Its optimiser, with the learning rate of this step.
        micro_batches: Batches as the loader gives them, on the model's device.
        settings: Clipping.
        precision: `torch.bfloat16` for autocast, `torch.float32` for none.
        parallel: Sums over ranks.
        step: Number of this step, for error messages.

    Returns:
        Mean loss per label in nats, the norm of the gradient before clipping, and what routers of experts report of
        their balance, the mean over layers and micro-batches.

    Raises:
        NonFiniteError: The loss or a gradient is NaN or infinite; nothing was changed.
    """
    device = parallel.device.type
    labels = torch.stack([(batch["labels"] != IGNORE_INDEX).sum() for batch in micro_batches]).sum()
    labels = parallel.sum(labels).clamp(min=1)
    total = torch.zeros((), device=parallel.device)
    records: list[AuxiliaryRecord] = []
    for batch in micro_batches:
        with torch.autocast(device, torch.bfloat16, enabled=precision == torch.bfloat16):
            out = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                cu_seqlens=batch["cu_seqlens"],
                shift_labels=batch["labels"],
                num_items_in_batch=labels,
                output_logits=False,
            )
        (out.loss * parallel.world_size).backward()  # data parallelism averages gradients; ours is a sum already
        total += out.loss.detach()
        records += [record for record in getattr(out, "auxiliary", None) or () if record is not None]
    mean_loss = float(parallel.sum(total))
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)  # (a sharded model gives a DTensor: take full_tensor())
    check_finite(step, mean_loss, float(norm), model)
    if 0 < settings.max_grad_norm < float(norm) + 1e-6:  # otherwise all gradients would be read and multiplied by 1
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), settings.max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, float(norm), _balance(records)


def _balance(records: list[AuxiliaryRecord]) -> dict[str, float]:
    """The mean of each statistic of the routers, read from the device at once."""
    found: dict[str, list[Tensor]] = {}
    for record in records:
        for name, value in (record.statistics or {}).items():
            found.setdefault(name, []).append(value.detach().float())
    if not found:
        return {}
    means = torch.stack([torch.stack(values).mean() for values in found.values()])
    return dict(zip(found, means.tolist(), strict=True))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _describe(
    recipe: Recipe,
    run: Run,
    dataset: PreparedDataset,
    model: Any,
    device: torch.device,
    precision: torch.dtype,
    command: str,
) -> dict[str, Any]:
    """What run.json says of a run before its first step."""
    found = dataset.metadata
    directory = dataset.directory.resolve()
    inside = directory.is_relative_to(run.directory.resolve())
    return {
        "name": recipe.name,
        "imports": recipe.imports,
        "finished": False,
        "command": command,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sequence_length": recipe.data.sequence_length,
        # relative where the run directory can be moved as a whole
        "dataset": str(directory.relative_to(run.directory.resolve()) if inside else directory),
        "corpus": {
            "name": found.corpus,
            "fingerprint": found.fingerprint,
            "tokenizer": found.tokenizer,
            "splits": {name: vars(counts) for name, counts in found.splits.items()},
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor()["model"],
        "threads": torch.get_num_threads(),
        "precision": str(precision).removeprefix("torch."),
        "versions": versions(),
    }
