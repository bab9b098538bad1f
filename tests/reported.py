"""Saved evaluations, records and folders of recoveries, small and of any names."""

import json

HOSTILE = "</script></title><img src=x onerror=\"document.title='taken'\"><b>{{7*7}}%{x}'&amp;"
TAME = "tame"


def figures(name, bits):
    return {
        "name": name, "documents": 2, "tokens": 9, "unknown": 0, "bytes": 20, "nats": 9.0,
        "bits_per_byte": bits, "perplexity": 7.5,
    }  # fmt: skip


def compared(name, change, verdict):
    kl = {"mean": 0.1, "median": 0.05, "p95": 0.3, "p99": 0.9, "agreement": 0.8, "logit_rms": 0.6}
    change = {"bits_per_byte": change, "low": change - 0.01, "high": change + 0.01}
    return {"name": name, "divergence": kl, "difference": {**change, "verdict": verdict}}


def cell(layer, module, distance):
    return {
        "layer": layer, "module": module, "relative_l2": distance, "cosine": 0.9,
        "sign_agreement": 0.9, "norm_ratio": 1.0,
    }  # fmt: skip


def model(ref, bits, *, parent=False, against=(), word=TAME, size=1000, speed=100.0):
    pace = {
        "prefill_per_second": 10 * speed, "decode_per_second": speed, "decode_peak": 5 * size,
        "cache_per_token": 64.0,
    }  # fmt: skip
    return {
        "name": ref.rpartition("/")[2], "ref": ref, "revision": None, "parent": parent,
        "parameters": size, "overall": figures("overall", bits),
        "domains": [figures(word, bits), figures("b.jsonl", bits + 0.1)], "speed": pace,
        "against": list(against),
        "samples": [{"document": word, "prompt": word, "text": f"{word}\nx", "repetition": 0.25}],
    }  # fmt: skip


def evaluation(word=TAME):
    """Two children beside two parents, with all that an evaluation may hold."""
    parents = [f"/models/{word.replace('/', '')}-p", "other/p"]
    beside = [
        {
            "name": ref.rpartition("/")[2],
            "ref": ref,
            "overall": compared("overall", 0.05, "worse"),
            "domains": [compared(word, 0.05, "worse"), compared("b.jsonl", 0.0, word)],
            "weights": {"cells": [cell(0, word, 0.0), cell(0, "b", 0.01), cell(1, "b", 0.5)]},
            "similarity": {"matrix": [[1.0, 0.4], [0.3, None]], "tokens": 9},
        }
        for ref in parents
    ]
    children = ["one/child", f"two/{word.replace('/', '')}-c"]
    task = {
        "name": word, "kind": "pairs", "metric": word,
        "models": [
            {"model": ref, "value": 0.5, "low": 0.4, "high": 0.6} for ref in [*parents, *children]
        ],
        "differences": [
            {"child": children[0], "parent": parents[0], "documents": 40, "difference": 0.1,
             "only_child": 5, "only_parent": 1, "p": 0.0213, "p_holm": 0.0427, "verdict": word}
        ],
    }  # fmt: skip
    gate = {"gate": word, "model": children[0], "parent": parents[0], "value": 1, "limit": 2}
    return {
        "format": "surgery-eval-1", "context": 8, "stride": 4, "bootstrap": 100, "seed": 0,
        "device": word, "models": [
            *(model(ref, 1.0, parent=True, word=word) for ref in parents),
            model(children[0], 1.05, against=beside, word=word, size=500, speed=150.0),
            model(children[1], 1.2, against=beside, word=word, size=500, speed=120.0),
        ],
        "tasks": [task], "gates": [{**gate, "holds": True}],
    }  # fmt: skip


def save_evaluation(path, word=TAME, **changes):
    path.write_text(json.dumps({**evaluation(word), **changes}), encoding="utf-8")
    return path


def save_record(folder, *inputs, operation="stack", parameters=None, facts=None):
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "surgery": 1, "operation": operation, "parameters": parameters or {"factor": 2},
        "inputs": [{"ref": str(ref), "revision": None, "files": {}} for ref in inputs],
        "facts": facts or {}, "versions": {"surgery": "1", operation: operation},
    }  # fmt: skip
    (folder / "surgery.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def save_recovered(folder, student, teacher, word=TAME):
    """Return the folder of a model with the facts of its recovery."""
    facts = {
        "trained": word, "teacher": str(teacher), "steps": 4, "tokens": 400, "steps_skipped": 1,
        "parameters_trained": 77, "losses": [[0, 2.0], [2, 1.5]],
        "held_out": {"before": 3.25, "after": 3.125},
    }  # fmt: skip
    return save_record(folder, student, operation="recover", facts=facts)


def save_training(folder, word=TAME, steps=4, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": i, "loss": 2.0 - i / 10, "kl": 1.0, word: 1.0 - i / 10, "lr": 1e-4,
         "gradient_norm": 1.0, "tokens_per_second": 50.0, "tokens": 100 * i, "verdict": "take"}
        for i in range(steps)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    (folder / "settings.json").write_text(json.dumps({"train": word}), encoding="utf-8")
    return folder


def save_everything(place, word=TAME):
    """Return paths of one of each, with a word at every place that a file can fill."""
    base = place / "base"
    base.mkdir(parents=True)
    student = save_record(place / "student", base, operation=word, parameters={word: [word]})
    healed = save_recovered(place / "healed", student, base, word)
    running = save_training(place / "running.surgery-run", word)
    return [save_evaluation(place / "run.json", word), healed, running]
