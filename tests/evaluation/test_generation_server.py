"""Answers by a server: equal to our own decoding item by item, each adapter by its name, and every refusal."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from helpers import benchmark_fixtures as fix
from helpers.loopback_server import BASE, GenerationEndpoint, save_adapter
from peft import PeftModel

from macdrop.errors import ConfigError
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.config.recorded import orders_of
from tune.config.resume import MACHINERY
from tune.config.run_spec import dump, load
from tune.errors import BenchmarkError
from tune.evaluation.adapters import AdapterSlot
from tune.evaluation.scorer import Scorer

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")]
WORDS = fix.WORDS[:4]
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Back-off in hundredths of a second."""
    import openai._base_client as client

    monkeypatch.setattr(client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def block(tmp_path: Path, url: str | None = None, stop: str = "e", **server) -> dict:
    rows = [
        {"question_id": i, "category": "qa", "turns": [f"Why is {word} so?", "And then?"][: 1 + i % 2]}
        for i, word in enumerate(WORDS)
    ]
    answers = [{"prompt": f"Name {word}:", "reference": word} for word in WORDS]
    found: dict = {
        "batch_size": 3,
        "generation": {
            "talks": {"data": fix.write_jsonl(tmp_path / "talks.jsonl", rows), "max_new_tokens": 6},
            "facts": {"data": fix.write_jsonl(tmp_path / "facts.jsonl", answers), "max_new_tokens": 10, "stop": [stop]},
        },
    }
    return found | (
        {"generation_server": {"base_url": url, "model": BASE, "max_concurrent": 2, **server}} if url else {}
    )


def answered(tmp_path: Path, given: dict, adapters: list[Path | None], tokenizer=None) -> tuple[list, list, Scorer]:
    """Score both benchmarks with each adapter in place; return rows and kept items, and the scorer."""
    base = fix.tiny_llama()
    scorer, slot = Scorer(base, tokenizer or fix.byte_tokenizer(), build(EvalSpec, given)), AdapterSlot(base)
    scorer.prepare()
    rows, items = [], []
    for adapter in adapters:
        with slot.adapter(adapter) as model:
            for job in scorer.jobs():
                file = tmp_path / "items.jsonl"
                rows += scorer.score(job, model=model, answers_path=file, adapter=adapter)
                items += [json.loads(line) for line in file.read_text().splitlines()]
    return rows, items, scorer


def bare(items: list[dict]) -> list[dict]:
    return [{key: value for key, value in item.items() if key not in ("own_answer", "same")} for item in items]


def figures(rows: list) -> list[tuple]:
    return [(row["task"], row["metric"], row["value"], row["stderr"], row["n"]) for row in rows]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_server_answers_item_by_item_as_our_own_decoding(tmp_path, kind):
    """The base and two LoRA adapters, chat turns, end tokens and stop texts: texts, tokens, ends and scores."""
    adapters = [None, *(save_adapter(tmp_path / str(seed), seed=seed) for seed in (1, 2)), None]
    tokenizer = fix.byte_tokenizer(chat_template=CHAT)
    free = answered(tmp_path, block(tmp_path), [None], tokenizer)[1]
    stop = next(item["answers"][0][1] for item in free if item.get("reference") and item["answers"][0][1:2].strip())
    ours = answered(tmp_path, block(tmp_path, stop=stop), adapters, tokenizer)
    with GenerationEndpoint(kind) as server:
        theirs = answered(tmp_path, block(tmp_path, server.url, stop, adapters=kind, compared=2), adapters, tokenizer)
    assert bare(theirs[1]) == ours[1] and len(ours[1]) == 4 * 2 * len(WORDS)
    assert figures(theirs[0]) == figures(ours[0])
    assert len({json.dumps(item["answers"]) for item in ours[1]}) > len(WORDS), "adapters answer differently"
    assert {"stop", "length"} <= {ended for item in ours[1] for ended in item["ended"]}
    compared = [item["same"] for item in theirs[1] if "same" in item]
    assert compared == [True] * (4 * 2 * 2) and not [note for note in theirs[2].notes if "differ" in note]
    assert all(row["settings"].endswith(f" by={kind}") for row in theirs[0]), "scores say who decoded"
    assert [what for what, _ in server.events] == ["load", "unload"] * 4 and set(server.models) == {BASE}
    loaded = [path for what, path in server.events if what == "load"]
    assert loaded == [str(folder) for folder in adapters[1:3] for _ in range(2)], "once for each benchmark"
    names = dict.fromkeys(body["model"] for body in server.requests)
    assert len(names) == 3 and all(name == BASE or name.startswith(f"{BASE}:") or kind == "vllm" for name in names)


def test_a_merged_dora_model_is_requested_by_name(tmp_path):
    """Served under the name that the rule gives; our own actor holds base and DoRA adapter."""
    folder = save_adapter(tmp_path / "trial-7" / "adapter", dora=True)
    merged = PeftModel.from_pretrained(fix.tiny_llama(), folder).merge_and_unload().eval()
    ours = answered(tmp_path, block(tmp_path), [folder])
    with GenerationEndpoint(served={"tiny-trial-7": merged}) as server:
        given = block(tmp_path, server.url, adapters="named", adapter_name="{model}-{trial}")
        theirs = answered(tmp_path, given, [folder])
    assert bare(theirs[1]) == ours[1] and {body["model"] for body in server.requests} == {"tiny-trial-7"}
    assert server.events == []


def test_other_weights_on_the_server_are_noted(tmp_path):
    """A server that takes an adapter and answers with the base, as some did."""
    folder = save_adapter(tmp_path / "a")
    with GenerationEndpoint(load=lambda _: fix.tiny_llama()) as server:
        rows, items, scorer = answered(tmp_path, block(tmp_path, server.url, compared=3), [folder])
    notes = [note for note in scorer.notes if "differ from our own decoding" in note]
    assert len(notes) == 2 and "of 3 answers of the server" in notes[0]
    assert sum("same" in item for item in items) == 6 and any(item.get("same") is False for item in items)


def test_the_end_token_may_be_left_out(tmp_path):
    def trimmed(body: dict, reply: dict) -> dict:
        choice = reply["choices"][0]
        if choice["finish_reason"] == "stop" and choice["token_ids"][-1] in body["stop_token_ids"]:
            reply = copy.deepcopy(reply)
            reply["choices"][0] |= {"token_ids": choice["token_ids"][:-1], "matched_stop": choice["token_ids"][-1]}
        return reply

    free = answered(tmp_path, block(tmp_path), [None])[1]
    end = next(token for item in free for token in fix.byte_tokenizer().encode(item["answers"][0])[2:])
    tokenizer = fix.byte_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    ours = answered(tmp_path, block(tmp_path), [None], tokenizer)
    with GenerationEndpoint(says=trimmed) as server:
        theirs = answered(tmp_path, block(tmp_path, server.url, compared=0), [None], tokenizer)
    assert bare(theirs[1]) == ours[1] and "eos" in {ended for item in ours[1] for ended in item["ended"]}


def test_failed_requests_are_repeated(tmp_path):
    failures = iter([500, 429, 503])
    with GenerationEndpoint(says=lambda body, reply: next(failures, reply)) as server:
        theirs = answered(tmp_path, block(tmp_path, server.url), [None])
    assert bare(theirs[1]) == answered(tmp_path, block(tmp_path), [None])[1]
    assert len(server.requests) > 3


# --- refusals ---


def test_what_the_server_lacks_is_refused_before_anything_is_scored(tmp_path):
    with GenerationEndpoint() as server:
        with pytest.raises(ConfigError, match=r"serves no model 'tony'\. Did you mean 'tiny'"):
            answered(tmp_path, block(tmp_path, server.url, model="tony"), [None])
        wrong = block(tmp_path, server.url.removesuffix("/v1"))
        with pytest.raises(BenchmarkError, match="does not list its models"):
            answered(tmp_path, wrong, [None])
    with pytest.raises(BenchmarkError, match="cannot be reached"):
        answered(tmp_path, block(tmp_path, server.url, request_retries=0), [None])


def test_adapters_that_the_server_cannot_have_are_refused(tmp_path):
    dora = save_adapter(tmp_path / "dora", dora=True)
    with GenerationEndpoint() as server:
        with pytest.raises(ConfigError, match=r"is DoRA, which vllm does not load.*export --merged"):
            answered(tmp_path, block(tmp_path, server.url), [dora])
        named = block(tmp_path, server.url, adapters="named", adapter_name="{trial}")
        with pytest.raises(ConfigError, match="has no model"):
            answered(tmp_path, named, [save_adapter(tmp_path / "absent")])
    with GenerationEndpoint("sglang") as server, pytest.raises(BenchmarkError, match="(?s)VLLM_ALLOW_RUNTIME_LORA"):
        answered(tmp_path, block(tmp_path, server.url), [save_adapter(tmp_path / "a")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda reply: reply["choices"][0].pop("token_ids"), "sent no token_ids"),
        (lambda reply: reply.pop("choices"), "sent no completion"),
    ],
)
def test_replies_that_cannot_be_read_are_refused(tmp_path, change, message):
    def broken(body: dict, reply: dict) -> dict:
        change(reply)
        return reply

    with GenerationEndpoint(says=broken) as server, pytest.raises(Exception, match=message):
        answered(tmp_path, block(tmp_path, server.url), [None])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attacks": ["none", "zeroing@1"]}, "cannot answer under zeroing@1.*generation.talks.attacks: none"),
        ({"generation": {}}, "lists none"),
        ({"generation_server": {"base_url": "tiny:8000", "model": BASE}}, "must be an address"),
        ({"generation_server": {"base_url": "http://h/v1", "model": BASE, "api_key": "x"}}, "unknown key api_key"),
        ({"generation_server": {"base_url": "http://h/v1", "model": BASE, "adapters": "named"}}, "belong together"),
        (
            {"generation_server": {"base_url": "http://h/v1", "model": BASE, "adapter_name": "x"}},
            "adapter_name and adapters: named",
        ),
        (
            {
                "generation_server": {
                    "base_url": "http://h/v1",
                    "model": BASE,
                    "adapters": "named",
                    "adapter_name": "{run}",
                }
            },
            r"adapter_name has \{run\}",
        ),
    ],
)
def test_blocks_that_no_server_can_do_are_refused(tmp_path, keys, message):
    given = block(tmp_path, "http://127.0.0.1:8000/v1")
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        build(EvalSpec, given | keys)


def test_dora_trials_are_refused_before_anything_starts(tmp_path):
    given = json.dumps({"model_name_or_path": "zoo:planted-llama", "eval": block(tmp_path, "http://127.0.0.1:8/v1")})
    (tmp_path / "run.yaml").write_text(given)
    spec = load(tmp_path / "run.yaml")
    for dora in ("use_dora=true", "sweep.parameters={use_dora: [true, false]}"):
        with pytest.raises(ConfigError, match="loads LoRA and no DoRA"):
            load(tmp_path / "run.yaml", [dora])
    assert orders_of(dump(spec)) == {
        "eval.generation_server.base_url=http://127.0.0.1:8/v1": (
            "sends prompts and the paths of adapters to http://127.0.0.1:8/v1"
        )
    }
    place = "eval.generation_server."
    assert f"{place}base_url" in MACHINERY and not {f"{place}adapters", f"{place}model"} & MACHINERY
