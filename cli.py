"""The command line: parse, call, print. Every command is the Python function of the same name."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import click

from . import __version__
from .commands import OF_INPUTS, OF_WEIGHTS, store_option
from .errors import Interrupted, PrepError
from .preprocess.numerics.methods import POOLINGS, PUBLISHED, SELECTIONS, SOLVERS
from .preprocess.options import (
    BASIS_DTYPES,
    COMPATIBLE,
    MODEL_DTYPES,
    MOMENT_DTYPES,
    MOMENTS,
    PRODUCTS,
    CovarianceOptions,
    DecomposeOptions,
)


class _Group(click.Group):
    """Commands in pipeline order; a PrepError is one line and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (PrepError, Interrupted) as error:
            shown = click.ClickException(" ".join(str(error).split()))
            vars(shown)["exit_code"] = error.exit_code
            if error.silent:
                sys.exit(error.exit_code)
            raise shown from error


_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="prep", package_name="prep-bases")
def main() -> None:
    """Calibrate once, decompose once, train many times.

    \b
    prep covariance --model X --data Y     second moments of every linear layer's input
    prep decompose                         their whitened SVD bases
    prep info                              what the store holds
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries would bury the one line of an error
    # read when torch loads: its idle threads sleep, and leave the cores to those of products.py and workers.py
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _shared(command: Callable) -> Callable:
    """--store and --quiet, common to all commands."""
    command = click.option("--quiet", "-q", is_flag=True, help="Print errors only.")(command)
    return click.option("--store", default="prep.zarr", envvar="PREP_STORE", show_envvar=True, help="The zarr store.")(
        command
    )


def _option(options: type, flag: str, **settings: Any) -> Callable[[Callable], Callable]:
    """A click option whose default is that of the field of `options` with its name."""
    name = flag.split("/")[0].removeprefix("--").replace("-", "_")
    default = {field.name: field.default for field in fields(options)}[{"for": "for_"}.get(name, name)]
    arguments = [flag, "for_"] if name == "for" else [flag]
    return click.option(*arguments, default=default, **settings)


_covariance_option = partial(_option, CovarianceOptions)
_decompose_option = partial(_option, DecomposeOptions)


@main.command(short_help="Second moments of every linear layer's input.")
@click.option("--model", required=True, help="Path or hub id of the model.")
@click.option(
    "--data",
    required=True,
    multiple=True,
    help="Hub id, or a .jsonl .json .parquet .csv .txt file (but for .parquet also with .gz or .zst), or a glob of "
    "files. Repeated, a mixture: a.jsonl=2 gives twice the sequences of b.jsonl.",
)
@_shared
@_covariance_option("--revision", help="Revision of the model on the hub.")
@_covariance_option("--subset", help="Configuration of a hub data set.")
@_covariance_option("--split", help="Split of the data set.")
@_covariance_option("--text-column", help="Column that holds the text.  [default: text, or the only text column]")
@_covariance_option("--template", help=r'Text made of columns, such as "{question}\n{answer}".')
@_covariance_option("--chat-column", help="Column of chat messages, formatted by the model's chat template.")
@_covariance_option(
    "--label-mask",
    is_flag=True,
    help="Count the tokens of answers only: what the chat template marks as generation, or a --template from "
    "--answer-from on. The model reads all tokens.",
)
@_covariance_option("--answer-from", help='The part of --template that the answer begins with, such as "{answer}".')
@_covariance_option("--num-sequences", type=click.IntRange(1), help="Sequences to calibrate on.")
@_covariance_option(
    "--until", help="Read twice as many sequences until bases lose less than this share, such as 2%, by lack of data."
)
@_covariance_option("--rank", type=click.IntRange(1), help="The rank that --until looks at.  [default: 64]")
@_covariance_option("--seq-len", type=click.IntRange(1), help="Tokens per sequence.")
@_covariance_option("--batch-size", type=click.IntRange(1), help="Sequences per forward pass.")
@_covariance_option("--pack/--no-pack", help="Join documents by the end token, or pad one per sequence.")
@_covariance_option("--seed", type=click.IntRange(0), help="Seed of the document order.")
@_covariance_option(
    "--targets",
    multiple=True,
    help="Regular expression of layer names, or a pattern such as *.q_proj; repeatable.  [default: all-linear, those "
    "in blocks]",
)
@_covariance_option("--exclude", multiple=True, help="The same, of layers to leave out; repeatable.")
@_covariance_option("--layers", help="Block numbers, such as 0-3,8.")
@_covariance_option(
    "--moment",
    type=click.Choice(MOMENTS),
    help="full: E[x x^T]; diagonal: E[x_i^2]; output: E[y y^T], y = W x; "
    "auto: output where all layers of a site have d_in > 2 d_out.",
)
@_covariance_option(
    "--moment-dtype",
    type=click.Choice(MOMENT_DTYPES),
    help="Of the stored moments; float32 halves the store and rounds C.",
)
@_covariance_option(
    "--dtype",
    type=click.Choice(MODEL_DTYPES),
    help="Of the model; auto: float32 on a CPU, else the checkpoint's.",
)
@_covariance_option("--device", help="Device of the model.  [default: cuda where there is one]")
@_covariance_option(
    "--device-map",
    help="Spread a large model over devices and disk (accelerate): auto, balanced, sequential, a device, "
    'or JSON or a .json file such as {"": "disk", "model.layers.0": 0}.',
)
@_covariance_option(
    "--max-memory",
    help="What --device-map auto may take of each device, such as 0=20GB,cpu=60GB; the rest goes to disk.",
)
@_covariance_option(
    "--halves/--no-halves", help="Keep the moments of the first half, too: what more data would gain is told by them."
)
@_covariance_option(
    "--keep-tokens",
    type=click.IntRange(0),
    help="Keep the inputs of so many random tokens per site, too, in float32, for `decompose --pooling mean_abs`.",
)
@_covariance_option(
    "--compat",
    type=click.Choice(COMPATIBLE),
    help="peft-corda: sequences divided by their maximum, padding counted, as PEFT's preprocess_corda does.",
)
@_covariance_option(
    "--block-by-block/--no-block-by-block",
    help="Load one block of the model at a time, run it over all batches and free it: for a model larger than the "
    "memory.  [default: where it does not fit]",
)
@_covariance_option("--memory-budget", help="For the accumulators; above it, several passes are made.")
@_covariance_option(
    "--device-memory",
    metavar="SIZE",
    help="For accumulators on each GPU; by default what a batch leaves free. 0 keeps them on the host.",
)
@_covariance_option(
    "--products",
    type=click.Choice(PRODUCTS),
    help="On a GPU: auto multiplies half-precision activations as they are, exact in float32.",
)
@_covariance_option("--checkpoint-every", help="How often the state of an unfinished run is stored.")
@_covariance_option(
    "--dry-run", is_flag=True, help="Print memory, disk and time, from one batch per pass as a sample; store nothing."
)
@_covariance_option("--overwrite", is_flag=True, help="Replace the store that is there when the new one is complete.")
@_covariance_option("--break-lock", is_flag=True, help="Take a writer's lock that was left behind by another machine.")
@_covariance_option("--trust-remote-code", is_flag=True, help="Run code from the model's repository.")
def covariance(store: str, quiet: bool, **options: Any) -> None:
    """Stream text through a model and store the second moment of every linear layer's input.

    The second moment is C = E[x x^T], uncentred, over real tokens; layers that read the same input share one.

    \b
    prep covariance --model HuggingFaceTB/SmolLM2-135M --data openai/gsm8k --subset main \\
        --template "{question}\\n{answer}"
    prep covariance --model ./model --data "text/*.jsonl" --num-sequences 64 --seq-len 256
    prep covariance --model ./model --data text.jsonl --until 2% --rank 64 --num-sequences 4096
    prep covariance --model ./model --data code.jsonl=2 --data prose.jsonl
    """
    from .preprocess.calibration.estimate import Estimate, lines
    from .preprocess.covariance import covariance as run
    from .preprocess.distributed import launched
    from .store.info import skipped_lines

    result = run(store=store, quiet=quiet, distributed=launched(), **options)
    if result is None:  # rank 0 says the rest
        return
    if isinstance(result, Estimate):
        for line in lines(result):
            click.echo(line)
        return
    moments = result.moments
    tokens = result.corpus["tokens"] if result.corpus else 0
    _say(quiet, f"{store}: {len(moments)} layers, {len(moments.sites)} sites, {tokens:,} tokens")
    for line in skipped_lines(moments.skipped):
        _say(quiet, f"skipped {line}")
    _say(quiet, f"next: prep decompose{store_option(store)}")


@main.command(short_help="Whitened SVD bases of every layer.")
@_shared
@_decompose_option(
    "--for",
    multiple=True,
    metavar=f"[{'|'.join(PUBLISHED)}]",
    help="A published method: metric, power and select. Several, repeated or joined by commas, share one load of the "
    "model and one reading of each moment.",
)
@_decompose_option(
    "--repair",
    metavar="COPY",
    help="Decompose the error W - Q of a quantised copy: a recipe (nf4, fp4, int8, int4, int3, int2, int4-g128 ...), "
    "or the path or hub id of a quantised model.",
)
@_decompose_option("--name", help="Name of the basis.  [default: from metric, power and select]")
@_decompose_option(
    "--metric",
    type=click.Choice(OF_WEIGHTS),
    help="What the SVD is taken in: M = C^a, diag(C)^a or I.  [default: full]",
)
@_decompose_option("--power", type=float, help="The power a of the metric.  [default: 0.5]")
@_decompose_option("--damping", type=float, help="Relative: C + damping mean(diag C) I.  [default: 0.001]")
@_decompose_option("--epsilon", type=float, help="Absolute damping instead: C + epsilon I.")
@_decompose_option("--center/--no-center", help="Subtract the mean: C - E[x] E[x]^T.  [default: no-center]")
@_decompose_option("--rank", type=click.IntRange(1), help="Directions to keep; clipped per layer.")
@_decompose_option("--select", type=click.Choice(SELECTIONS), help="Which directions to keep.  [default: top]")
@_decompose_option(
    "--pooling",
    type=click.Choice(POOLINGS),
    help="Of an activation: its root mean square, or the mean of its magnitude over the tokens that were kept "
    "(`covariance --keep-tokens`).  [default: rms]",
)
@_decompose_option(
    "--solver",
    type=click.Choice(SOLVERS),
    help="exact: float64 Gram route; svd: float64 SVD of W M; randomized: certified within 1e-3 of the optimum.",
)
@_decompose_option("--dtype", type=click.Choice(list(BASIS_DTYPES)), help="Of stored U and P.")
@_decompose_option(
    "--sample",
    type=click.IntRange(0),
    help="Layers of each kind to cross-fit between halves of the tokens, 0 for all.  [default: 2]",
)
@_decompose_option("--model", help="Path or hub id.  [default: the store's model]")
@_decompose_option("--revision", help="Revision of --model on the hub.")
@_decompose_option("--overwrite", is_flag=True, help="Replace the basis of that name when the new one is complete.")
@_decompose_option("--break-lock", is_flag=True, help="Take a writer's lock that was left behind by another machine.")
@_decompose_option("--trust-remote-code", is_flag=True, help="Run code from the model's repository.")
@_decompose_option("--dry-run", is_flag=True, help="Print what is read, memory and disk, from shapes; store nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what --dry-run finds as JSON.")
def decompose(store: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Decompose every layer in the metric of its second moment: W M = U diag(S) V^T, P = V^T M^-1.

    \b
    prep decompose                               the C^(1/2)-whitened SVD
    prep decompose --for corda_kpm --rank 32     a published method
    prep decompose --for pissa,whitened,eva      several at once
    prep decompose --metric identity --model X   plain SVD, needs no covariance
    prep decompose --repair nf4                  what bitsandbytes' 4 bits lose of W
    """
    from .preprocess.decompose import decompose as run
    from .preprocess.decomposition.estimate import Estimate, lines
    from .preprocess.distributed import launched

    if as_json and not options["dry_run"]:
        raise PrepError("--json prints what --dry-run finds: give that, too")
    bases = run(store, quiet=quiet, distributed=launched(), **options)
    if bases is None:  # rank 0 says the rest
        return
    if isinstance(bases, Estimate):
        for line in [json.dumps(vars(bases), indent=2)] if as_json else lines(bases, store):
            click.echo(line)
        return
    for basis in {basis.name: basis for basis in (bases if isinstance(bases, list) else [bases])}.values():
        _say_basis(store, quiet, basis)
    _say(quiet, f"next: prep info{store_option(store)}")


def _say_basis(store: str, quiet: bool, basis: Any) -> None:
    """What was kept of every layer of a basis, and what of it is not resolved."""
    energies = sorted(record.energy for record in basis.layers.values())
    ranks = sorted({record.rank for record in basis.layers.values()})
    kept = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
    _say(
        quiet,
        f"{store}: basis {basis.name}, {len(basis)} layers, rank {kept}, "
        f"captured energy {energies[0]:.3f} to {energies[-1]:.3f}, median {energies[len(energies) // 2]:.3f}",
    )
    unresolved = sum(record.rank > record.numerical_rank for record in basis.layers.values())
    if unresolved:
        _say(quiet, f"{unresolved} layers keep directions below their numerical rank: see `prep info --json`")


@main.command(short_help="What every basis loses of the layers' outputs.")
@_shared
@click.option("--on", help="Another store of the same model: score on its tokens.")
@click.option("--basis", "bases", multiple=True, help="Name of a basis; repeatable.  [default: all]")
@click.option(
    "--rank", "ranks", type=click.IntRange(1), multiple=True, help="Repeatable.  [default: 8, 16, 32 ... as stored]"
)
@click.option(
    "--sample",
    type=click.IntRange(0),
    help="Layers of each kind to cross-fit between halves, 0 for all.  [default: the 2 that decompose noted]",
)
@click.option("--model", help="Path or hub id.  [default: the store's model]")
@click.option("--revision", help="Revision of --model on the hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code from the model's repository.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: all rows, and a summary.")
def evaluate(store: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Show what every basis loses of E||W x||^2, by kind of layer and rank.

    A cell such as "5.10% +2.0%" reads: 5.10 % of the output is lost (mean of the layers), and the basis loses 2.0 %
    more than it needs to (median), which more data would gain. The second number comes from the two halves of the
    tokens, where the store has them.

    \b
    prep evaluate                                every basis, on its own tokens
    prep evaluate --basis full --on code.zarr    how far it carries over to other data
    """
    from .preprocess.evaluate import evaluate as run
    from .preprocess.evaluation.rows import summary, table

    rows = run(store, **options)
    if as_json:
        click.echo(json.dumps({"rows": [vars(row) for row in rows], "summary": summary(rows)}, indent=2))
        return
    for line in table(rows):
        click.echo(line)


@main.command(short_help="A rank for every layer under a budget of parameters.")
@_shared
@click.option(
    "--budget", required=True, help="Parameters of all layers, such as 2M; or the share to keep, such as 95%."
)
@click.option("--basis", default="full", help="Name of the basis.")
@click.option("--layers", help="A regular expression searched in layer names.  [default: all]")
@click.option("--output", "-o", type=click.Path(), help="Write the ranks to this file: a rank_pattern of PEFT.")
@click.option("--overwrite", is_flag=True, help="Replace the file that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: all ranks, and a summary.")
def ranks(store: str, quiet: bool, output: str | None, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Choose a rank for every layer so that all layers together lose least of their outputs.

    Parameters are those of LoRA, r (d_in + d_out) of every layer. It is a budget of output error, not of accuracy.

    \b
    prep ranks --budget 2M -o ranks.json         LoraConfig(rank_pattern=json.load(open("ranks.json")), ...)
    prep ranks --budget 95% --layers self_attn   the fewest parameters found that keep 95 % of the outputs
    """
    from .files import new_json
    from .store.ranks import choose, summary, table

    found = choose(store, **options)
    said = summary(found)
    if output is not None:
        new_json(output, said["ranks"], overwrite)
    for line in [json.dumps(said, indent=2)] if as_json else table(found):
        click.echo(line)
    if output is not None and not as_json:
        _say(quiet, f"written to {output}; next, in Python: LoraConfig(rank_pattern=..., target_modules=list(...))")


@main.command(short_help="What a store holds.")
@_shared
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def info(store: str, quiet: bool, as_json: bool) -> None:
    """Show what a store holds: model, corpus, moments, bases."""
    from .store.info import info as run
    from .store.info import table

    facts = run(store)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for line in table(facts):
        click.echo(line)
    whole = {name: basis for name, basis in facts["bases"].items() if "problem" not in basis}
    repairs = [name for name, basis in whole.items() if basis["repairs"] is not None]
    trainable = [name for name in whole if name not in repairs and whole[name]["method"]["metric"] not in OF_INPUTS]
    if facts["status"] != "complete":
        _say(quiet, "next: the same `prep covariance` command again")
    elif trainable:
        _say(quiet, f'next, in Python: prep.attach(model, "{store}", core="gain", basis="{trainable[0]}")')
    elif repairs:
        start = f'prep.peft.get_model(quantised, "{store}", init="repair", basis="{repairs[0]}")'
        _say(quiet, f"next, in Python: {start}")
    else:
        _say(quiet, f"next: prep decompose{store_option(store)}")


@main.command(short_help="What a store holds, as a page with figures.")
@_shared
@click.option(
    "--output", "-o", "path", default="report.html", help="The HTML file; a report that is there is replaced."
)
@click.option("--overwrite", is_flag=True, help="Replace any other file that is there, too.")
def report(store: str, quiet: bool, path: str, overwrite: bool) -> None:
    """Write one HTML file with figures of what a store holds, to open in a browser, offline (extra prep-bases[report]).

    Kept output by layer and rank, spectra, what more data would gain, bases side by side, layers that stand out. It is
    made of the store alone: no model is loaded and nothing is decomposed.
    """
    from .reporting.report import report as run

    _say(quiet, f"written to {run(store, path, overwrite=overwrite)}")


@main.command(short_help="A basis or moments as files that others read.")
@_shared
@click.option(
    "--to",
    required=True,
    type=click.Choice(
        ["peft-corda", "peft-corda-covariance", "peft-eva", "peft-lora", "safetensors", "imatrix", "hessian"]
    ),
    help="What to write.",
)
@click.argument("path")
@click.option("--basis", help="Name of the basis.  [default: the one that the form is made of]")
@click.option("--rank", type=click.IntRange(1), help="Directions to take; needed by peft-corda, peft-eva, peft-lora.")
@click.option("--lora-alpha", type=float, help="Of a peft-lora adapter.  [default: the rank]")
@click.option(
    "--split",
    type=click.Choice(["even", "A", "B"]),
    help="Of a peft-lora adapter: how S is shared between A and B.  [default: even; A for the basis of astra]",
)
@click.option("--rho", type=float, default=2.0, help="Of peft-eva: how far ranks are redistributed between layers.")
@click.option("--overwrite", is_flag=True, help="Replace the file or directory that is there.")
def export(store: str, quiet: bool, **options: Any) -> None:
    """Write a basis or the moments to PATH in a form that an unmodified PEFT script, or a quantiser, reads.

    \b
    prep export --to peft-corda corda.pt --rank 32        CordaConfig(cache_file=...)
    prep export --to peft-corda-covariance cov.pt         CordaConfig(covariance_file=...)
    prep export --to peft-eva eva.pt --rank 16            initialize_lora_eva_weights(..., eva_state_dict=...)
    prep export --to peft-lora adapter/ --basis full --rank 16
    prep export --to safetensors basis.safetensors        U, S and P of every layer
    prep export --to imatrix imatrix.gguf                 llama-quantize --imatrix ...
    prep export --to hessian hessians/                    QuIP# and VPTQ: --hessian_path ...
    """
    from .adapters.peft.export import export as run

    _say(quiet, f"written to {run(store, **options)}")


@main.command(short_help="Check a store: checksums, shapes, identities, weights.")
@_shared
@click.option("--model", help="Path or hub id: check the weights that the store was made from, too.")
@click.option("--revision", help="Revision of --model on the hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code from the model's repository.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(store: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Check every chunk, hash, shape and identity of a store; exit code 1 if anything is wrong."""
    from .preprocess.verify import verify as run

    report = run(store, **options)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        for finding in report.findings:
            click.echo(f"{finding.where}: {finding.problem}")
        whole = "whole" if not report.findings else f"{len(report.findings)} findings"
        size = f"{report.arrays:,} arrays, {report.bytes / 1e6:,.0f} MB"
        _say(quiet, f"{store}: {report.sites} sites, {report.bases} bases, {size}: {whole}")
    if report.findings:
        sys.exit(1)


@main.command(short_help="Take bases or the moments out of a store.")
@click.argument("names", nargs=-1, metavar="[BASIS]...")
@_shared
@click.option("--moments", is_flag=True, help="Remove the moments, and keep the bases made of them.")
@click.option("--break-lock", is_flag=True, help="Take a writer's lock that was left behind by another machine.")
def remove(names: tuple[str, ...], store: str, quiet: bool, **options: Any) -> None:
    """Remove bases by name, or the moments; `prep info` lists them with their sizes.

    \b
    prep remove identity full-p1      two bases
    prep remove --moments             what `prep covariance` wrote; the same command would bring it back
    """
    from .store.remove import remove as run

    left = run(store, names, **options)
    _say(quiet, f"{store}: {', '.join([*names, *['the moments'] * options['moments']])} removed")
    _say(
        quiet,
        f"left: {', '.join(left.attrs['bases']) or 'no basis'}{'' if left.corpus is None else ', and the moments'}",
    )


@main.command(short_help="The moments of several stores of one model as one.")
@click.argument("parts", nargs=-1, required=True)
@_shared
@click.option("--weights", help="Of the parts' tokens, such as 1,2.  [default: 1 for all]")
@click.option("--overwrite", is_flag=True, help="Replace the store that is there.")
@click.option("--break-lock", is_flag=True, help="Take a writer's lock that was left behind by another machine.")
def pool(parts: tuple[str, ...], store: str, quiet: bool, weights: str | None, **options: Any) -> None:
    """Combine calibrations of one model on different data: C = sum w_i n_i C_i / sum w_i n_i.

    \b
    prep pool code.zarr prose.zarr --store both.zarr --weights 1,2
    """
    from .store.pool import pool as run

    try:
        numbers = [float(weight) for weight in weights.split(",")] if weights else None
    except ValueError as error:
        raise PrepError(f"--weights {weights!r} are not numbers: write them like 1,2") from error
    pooled = run(parts, store=store, weights=numbers, **options)
    tokens = pooled.corpus["tokens"] if pooled.corpus else 0
    _say(quiet, f"{store}: {len(pooled.moments)} layers, {tokens:,} tokens of {len(parts)} stores")
    _say(quiet, f"next: prep decompose{store_option(store)}")


@main.command(short_help="Copy a store to a URL.")
@click.argument("url")
@_shared
@click.option("--overwrite", is_flag=True, help="Replace the store that is there.")
@click.option("--break-lock", is_flag=True, help="Take a writer's lock that was left behind by another machine.")
def push(url: str, store: str, quiet: bool, **options: Any) -> None:
    """Copy the store to URL, such as s3://bucket/prep.zarr or hf://user/name, and verify the copy.

    Needs the extra prep-bases[remote].
    """
    from .store.transfer import push as run

    run(store, url, **options)
    _say(quiet, f"{url}: whole")


@main.command(short_help="Copy a store from a URL.")
@click.argument("url")
@_shared
@click.option("--overwrite", is_flag=True, help="Replace the store that is there.")
@click.option("--break-lock", is_flag=True, help="Take a writer's lock that was left behind by another machine.")
def pull(url: str, store: str, quiet: bool, **options: Any) -> None:
    """Copy the store at URL, such as hf://user/name@revision, to --store and verify the copy.

    Needs the extra prep-bases[remote].
    """
    from .store.transfer import pull as run

    run(url, store, **options)
    _say(quiet, f"{store}: whole")
    _say(quiet, f"next: prep info{store_option(store)}")


def _say(quiet: bool, line: str) -> None:
    if not quiet:
        click.echo(line)


if __name__ == "__main__":
    sys.exit(main())
