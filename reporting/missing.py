"""Why a section has nothing to show, in one sentence, and the command that would change that."""

from __future__ import annotations

from ..commands import store_option
from .budgets import LAYERS
from .gather import Facts

Why = tuple[str, str]  # the sentence, and the command


def no_kept(facts: Facts) -> Why:
    """Why no basis says what it keeps of the output."""
    if not facts.bases:
        return no_bases(facts)
    if facts.sites is None:
        why = "What a basis keeps of the output is told by moments, and the store has none to read."
        return why, _covariance(facts)
    if not any(site.matrix for site in facts.sites):
        why = "Diagonal moments do not tell what a basis keeps of the output: full ones do, or those of outputs."
        return why, _covariance(facts, " --moment full --overwrite")
    return "The bases were made before what they keep of the output was noted.", _again(facts)


def no_budget(facts: Facts) -> Why:
    """Why no ranks are chosen."""
    layers = [len(basis.basis) for basis in facts.bases.values() if basis.kept]
    option = store_option(facts.store.location)
    if not layers:
        return no_kept(facts)
    if min(layers) > LAYERS:
        return f"Ranks of more than {LAYERS:,} layers are not chosen here.", f"prep ranks --budget 95%{option}"
    return "No basis says what it keeps of the output of all its layers.", f"prep decompose{option}"


def no_bases(facts: Facts) -> Why:
    """Why there is no basis."""
    if facts.info["status"] != "complete":
        return "The store is not complete: run the same command again.", _covariance(facts)
    if facts.sites is None:
        return "There are neither moments nor bases to look at.", _covariance(facts)
    return "There is no complete basis.", f"prep decompose{store_option(facts.store.location)}"


def no_excess(facts: Facts) -> Why:
    """Why no basis says how far it is from the best one."""
    if not facts.bases:
        return no_bases(facts)
    if facts.sites is None:
        return (
            "The store has no moments to read, by which bases of more and of fewer tokens are compared.",
            _covariance(facts),
        )
    if not any(site.half for site in facts.sites):
        why = "The calibration kept no halves of its tokens, which tell how far a basis is from the best one."
        return why, _covariance(facts, " --overwrite")
    methods = [basis.basis.method for basis in facts.bases.values()]
    plain = all(method["metric"] == "identity" and method.get("select") != "activation" for method in methods)
    if plain or any(basis.excess for basis in facts.bases.values()):
        why = "More tokens would gain nothing: the bases do not depend on them, or lose nothing that they need not."
        return why, f"prep decompose{store_option(facts.store.location)}"
    if all(method.get("pooling") == "mean_abs" for method in methods):
        why = "Directions chosen by the mean |P x| of a sample are not compared between the halves, which keep none."
        return why, f"prep decompose{store_option(facts.store.location)}"
    return "The bases were not compared between the halves of the tokens.", _again(facts)


def _covariance(facts: Facts, options: str = "") -> str:
    return f"prep covariance --model X --data Y{options}{store_option(facts.store.location)}"


def _again(facts: Facts) -> str:
    """The command that makes the first basis anew."""
    basis = next(iter(facts.bases.values())).basis
    return basis.command(int(basis.method["rank"])).strip("`")
