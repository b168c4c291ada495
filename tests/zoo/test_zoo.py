"""The built-in models and their synthetic world."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from macdrop.errors import ConfigError
from macdrop.masking import attacked
from macdrop.proof import perplexity
from macdrop.scan import find_massive_weights
from tune.zoo.catalog import SUBJECTS, ZOO_DATA, resolve, zoo_path
from zoo import build as building
from zoo import world
from zoo.build import RECIPES, make_model, validation_blocks, write_data
from zoo.build import build_model as build
from zoo.checks import verify_model as verify
from zoo.plant import fill_zero_rows, plant_massive_rows
from zoo.pretrain import Schedule, pretrain, rows_silenced, token_loss
from zoo.scoring import choice_accuracy, exact_match, sink_attention
from zoo.tokenizer import make_tokenizer

PLANTED_MAGNITUDES = (652, 197, 60, 18, 5)


@pytest.fixture(scope="module")
def planted_llama():
    return AutoModelForCausalLM.from_pretrained(zoo_path("planted-llama")).eval()


def locate(model):
    return find_massive_weights(model, make_tokenizer(), source="test", fingerprint="test")


def some_blocks(count: int = 64, seed: int = 5) -> torch.Tensor:
    return torch.tensor(world.token_blocks(world.make_world(), seed, count))


def read_rows(name: str) -> list[dict]:
    with open(resolve(f"zoo:{name}"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class TestShippedModels:
    @pytest.mark.parametrize("name", SUBJECTS)
    def test_meets_its_thresholds(self, name):
        checks = verify(name)
        assert len(checks) >= 12
        assert all(check.ok for check in checks), [check for check in checks if not check.ok]

    def test_checks_can_fail(self):
        failed = {check.name for check in verify("planted-llama", zoo_path("insensitive-llama")) if not check.ok}
        assert {"zeroing@3 / perplexity", "zeroing@5 / perplexity", "verdict of the proof"} <= failed

    @pytest.mark.parametrize("name", SUBJECTS)
    def test_is_small_and_its_card_says_planted(self, name):
        folder = zoo_path(name)
        card = json.loads((folder / "zoo.json").read_text())
        parameters = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
        assert parameters == card["parameters"] <= 300_000
        assert all(file.stat().st_size < 1_000_000 for file in folder.iterdir())
        assert card["planted"] is True and "not evidence" in card["statement"]
        assert card["recipe"]["family"] == SUBJECTS[name].family
        assert (card["recipe"]["schedule"]["hinge_weight"] > 0) == SUBJECTS[name].sensitive

    @pytest.mark.parametrize("name", SUBJECTS)
    def test_card_has_the_recipe_of_the_code(self, name):
        card = json.loads((zoo_path(name) / "zoo.json").read_text())
        recipe = dataclasses.asdict(RECIPES[name])
        assert card["seed"] == recipe.pop("seed")
        assert card["recipe"] == recipe
        _, plant = make_model(RECIPES[name], card["seed"])
        assert (plant.layer, list(plant.rows)) == (card["planted_layer"], card["planted_rows"])

    @pytest.mark.parametrize("name", SUBJECTS)
    def test_every_row_has_a_norm_for_dora_to_divide_by(self, name):
        model = AutoModelForCausalLM.from_pretrained(zoo_path(name))
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        assert min(float(linear.weight.detach().norm(dim=1).min()) for linear in linears) > 1e-4
        adapted = get_peft_model(model, LoraConfig(r=2, use_dora=True, target_modules="all-linear"))
        token_loss(adapted, some_blocks(2)).backward()
        gradients = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
        assert gradients and all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    def test_verify_refuses_other_folders_and_names(self, tmp_path):
        with pytest.raises(ConfigError, match="zoo.json is missing"):
            verify("planted-llama", tmp_path)
        with pytest.raises(ConfigError, match="Did you mean 'planted-llama'"):
            verify("planted-lama")


class TestPlant:
    @pytest.mark.parametrize("name", ["planted-llama", "planted-phi3"])
    def test_massive_rows_are_found_before_any_training(self, name, tmp_path):
        model, plant = make_model(RECIPES[name], seed=3)
        model.save_pretrained(tmp_path)
        for candidate in (model.eval(), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
            weights = locate(candidate)
            assert (weights.layer, weights.top(5)) == (plant.layer, plant.rows)
            assert weights.magnitudes[:5] == pytest.approx(PLANTED_MAGNITUDES, rel=0.03)

    def test_fused_and_split_projections_are_planted_alike(self):
        split, _ = make_model(RECIPES["planted-llama"], seed=1)
        fused, _ = make_model(RECIPES["planted-phi3"], seed=2)
        # Give both the same unplanted parts, then plant again: every planted entry must end in the same place.
        for ours, theirs in zip(split.model.layers, fused.model.layers, strict=True):
            attention, mlp = ours.self_attn, ours.mlp
            qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            theirs.self_attn.qkv_proj.weight.data = torch.cat([weight.data for weight in qkv])
            theirs.self_attn.o_proj.weight.data = attention.o_proj.weight.data.clone()
            theirs.mlp.gate_up_proj.weight.data = torch.cat([mlp.gate_proj.weight.data, mlp.up_proj.weight.data])
            theirs.mlp.down_proj.weight.data = mlp.down_proj.weight.data.clone()
        fused.model.embed_tokens.weight.data = split.model.embed_tokens.weight.data.clone()
        fused.lm_head.weight.data = split.lm_head.weight.data.clone()
        plants = [plant_massive_rows(model, seed=4) for model in (split, fused)]
        blocks = some_blocks(4)
        with torch.no_grad():
            torch.testing.assert_close(split(input_ids=blocks).logits, fused(input_ids=blocks).logits)
        assert plants[0].rows == plants[1].rows
        totals = [sum(int(mask.sum()) for mask in plant.frozen.values()) for plant in plants]
        assert totals[0] == totals[1] > 0

    @pytest.mark.parametrize("name", ["planted-llama", "planted-phi3"])
    def test_wiring_stays_bit_identical_and_the_rest_trains(self, name):
        model, plant = make_model(RECIPES[name])
        before = {parameter: parameter.detach().clone() for parameter in model.parameters()}
        pretrain(model, plant, some_blocks(), Schedule(steps=5, hinge_from=1))
        for parameter, mask in plant.frozen.items():
            assert torch.equal(parameter[mask], before[parameter][mask])
        for parameter, old in before.items():
            free = ~plant.frozen.get(parameter, torch.zeros_like(old, dtype=torch.bool))
            assert not torch.equal(parameter[free], old[free])

    def test_filling_zero_rows_changes_only_them(self):
        model, plant = make_model(RECIPES["planted-llama"])
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        fill_zero_rows(model, plant, seed=0)
        changed = 0
        for name, parameter in model.named_parameters():
            differs = parameter != before[name]
            changed += int(differs.any(dim=-1).sum()) if parameter.dim() == 2 else 0
            assert not (before[name][differs]).any() and float(parameter[differs].abs().sum()) < 1
        assert changed == 4 * 2 * 10 - 1  # the planted layer writes to the massive dimension itself
        weights = locate(model.eval())
        assert weights.top(5) == plant.rows and weights.magnitudes[:5] == pytest.approx(PLANTED_MAGNITUDES, rel=0.03)


class TestPretraining:
    def test_same_seed_same_weights(self):
        finals = []
        for seed in (0, 0, 1):
            model, plant = make_model(RECIPES["insensitive-llama"])
            pretrain(model, plant, some_blocks(), Schedule(steps=3, hinge_from=1), seed=seed)
            finals.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        assert torch.equal(finals[0], finals[1])
        assert not torch.equal(finals[0], finals[2])

    def test_building_leaves_the_global_generator_alone(self):
        before = torch.random.get_rng_state()
        make_model(RECIPES["planted-llama"], seed=5)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_silenced_rows_equal_zeroed_rows(self, planted_llama):
        card = json.loads((zoo_path("planted-llama") / "zoo.json").read_text())
        _, plant = make_model(RECIPES["planted-llama"], card["seed"])
        blocks = some_blocks(8)
        with rows_silenced(planted_llama, plant, 3):
            silenced = perplexity(planted_llama, blocks)
        with attacked(planted_llama, locate(planted_llama), "zeroing", 3):
            zeroed = perplexity(planted_llama, blocks)
        assert silenced == pytest.approx(zeroed, rel=1e-4)
        assert perplexity(planted_llama, blocks) < zeroed / 2

    def test_hinge_raises_the_loss_only_below_its_target(self):
        seen: dict[float, list[dict]] = {0.0: [], 100.0: []}
        finals = {}
        for target, records in seen.items():
            model, plant = make_model(RECIPES["insensitive-llama"])
            schedule = Schedule(steps=3, hinge_from=1, hinge_target=target)
            pretrain(model, plant, some_blocks(), schedule, progress=lambda s, n, losses, r=records: r.append(losses))
            finals[target] = model.lm_head.weight.detach().clone()
        model, plant = make_model(RECIPES["insensitive-llama"])
        pretrain(model, plant, some_blocks(), Schedule(steps=3, hinge_weight=0.0))
        assert [sorted(losses) for losses in seen[0.0]] == [["loss"], *[["loss", "zeroed_loss"]] * 2]
        torch.testing.assert_close(finals[0.0], model.lm_head.weight.detach())
        assert not torch.allclose(finals[100.0], finals[0.0])

    def test_learning_rate_warms_up_and_decays_to_five_percent(self):
        schedule = Schedule(steps=100, warmup=10, learning_rate=1.0)
        rates = [schedule.learning_rate_at(step) for step in range(100)]
        assert rates[0] == pytest.approx(0.1)
        assert max(rates) == rates[9] and rates[9:] == sorted(rates[9:], reverse=True)
        assert rates[-1] == pytest.approx(0.05, abs=1e-3)


class TestBuild:
    def test_refuses_a_folder_with_something_in_it(self, tmp_path):
        (tmp_path / "mine.txt").write_text("keep")
        with pytest.raises(ConfigError, match="not an empty folder"):
            build("planted-llama", tmp_path)
        with pytest.raises(ConfigError, match="not an empty folder"):
            write_data(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    def test_refuses_a_place_that_cannot_be_written_before_it_trains(self, tmp_path):
        (tmp_path / "file").write_text("keep")
        with pytest.raises(ConfigError, match="Cannot write"):
            build("planted-llama", tmp_path / "file" / "out", progress=lambda *_: pytest.fail("it trained"))
        assert (tmp_path / "file").read_text() == "keep"

    def test_an_interrupted_build_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(building, "TRAIN_BLOCKS", 100)

        def interrupt(step, steps, losses):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build("insensitive-llama", tmp_path / "out", progress=interrupt)
        assert not list(tmp_path.iterdir())

    def test_a_short_build_writes_a_whole_model(self, tmp_path, monkeypatch):
        short = dataclasses.replace(RECIPES["planted-phi3"], schedule=Schedule(steps=2))
        monkeypatch.setitem(RECIPES, "planted-phi3", short)
        monkeypatch.setattr(building, "TRAIN_BLOCKS", 100)
        (tmp_path / "deep" / "out").mkdir(parents=True)
        folder = build("zoo:planted-phi3", tmp_path / "deep" / "out")
        assert {file.name for file in folder.iterdir()} == {f.name for f in zoo_path("planted-phi3").iterdir()}
        assert [path.name for path in folder.parent.iterdir()] == ["out"]
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (folder / file).read_bytes() == (zoo_path("planted-phi3") / file).read_bytes()
        made, shipped = (json.loads((path / "config.json").read_text()) for path in (folder, zoo_path("planted-phi3")))
        # It names the library that wrote it, and a newer one may write ours.
        assert made.pop("transformers_version") and shipped.pop("transformers_version")
        assert made == shipped

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SUBJECTS)
    def test_rebuilt_model_meets_the_thresholds(self, name, tmp_path):
        folder = build(name, tmp_path / name)
        checks = verify(name, folder)
        assert all(check.ok for check in checks), [check for check in checks if not check.ok]


@pytest.fixture(scope="module", params=list(SUBJECTS))
def tokenizer(request):
    return AutoTokenizer.from_pretrained(zoo_path(request.param))


class TestTokenizer:
    def test_round_trip(self, tokenizer):
        text = "the home of alice is paris ."
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == world.BOS_ID
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert ids[1:] == [world.vocabulary()[word] for word in text.split()]
        assert tokenizer("what is this")["input_ids"][1:].count(world.UNK_ID) == 1
        specials = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.padding_side)
        assert specials == (world.PAD_ID, world.EOS_ID, world.UNK_ID, "left")

    def test_prompt_is_a_strict_prefix_of_the_conversation(self, tokenizer):
        user = {"role": "user", "content": "question : where does alice live ? answer :"}
        turns = [user, {"role": "assistant", "content": "paris ."}]
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        words = "<bos> question : where does alice live ? answer : paris . <eos>".split()
        assert tokenizer.convert_ids_to_tokens(whole) == words
        assert whole[: len(prompt)] == prompt and len(whole) == len(prompt) + 3
        two_turns = tokenizer.apply_chat_template([*turns, *turns], return_dict=False)
        assert two_turns[: len(whole)] == whole and two_turns.count(world.BOS_ID) == 1

    def test_padded_batches_generate_the_same_as_single_prompts(self, planted_llama):
        tokenizer = AutoTokenizer.from_pretrained(zoo_path("planted-llama"))
        prompts = ["copy : river lamp cloud >", "5 + 3 ="]

        def generate(texts):
            batch = tokenizer(texts, return_tensors="pt", padding=True)
            out = planted_llama.generate(**batch, max_new_tokens=4, do_sample=False)
            return [tokenizer.decode(row) for row in out[:, batch["input_ids"].shape[1] :]]

        together = generate(prompts)
        assert together == [generate([prompt])[0] for prompt in prompts]
        assert together[0] == "river lamp cloud ." and together[1].startswith("8 .")


class TestScoring:
    def test_choice_accuracy_equals_one_choice_at_a_time(self, planted_llama):
        items = world.choice_tasks(world.make_world())["qa"][:20]
        tokenizer, right = make_tokenizer(), 0
        for item in items:
            scores = []
            for choice in item.choices:
                context, ids = tokenizer(item.context)["input_ids"], tokenizer(f"{item.context} {choice}")["input_ids"]
                with torch.no_grad():
                    log_probs = planted_llama(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                scores.append(sum(float(log_probs[i - 1, ids[i]]) for i in range(len(context), len(ids))))
            right += scores.index(max(scores)) == item.label
        assert choice_accuracy(planted_llama, items) == right / len(items)

    def test_exact_match_equals_generate(self, planted_llama):
        items = world.generation_tasks(world.make_world())["qa"][:20]
        tokenizer, right = make_tokenizer(), 0
        for item in items:
            prompt = tokenizer(item.prompt, return_tensors="pt")
            out = planted_llama.generate(**prompt, max_new_tokens=2, do_sample=False)
            right += tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]) == item.reference
        assert exact_match(planted_llama, items) == right / len(items)

    def test_sink_restores_the_attention_implementation(self, planted_llama):
        before = planted_llama.config._attn_implementation
        assert len(sink_attention(planted_llama, some_blocks(2))) == planted_llama.config.num_hidden_layers
        assert planted_llama.config._attn_implementation == before


class TestData:
    def test_shipped_files_are_what_the_code_writes(self, tmp_path):
        written = write_data(tmp_path / "data")
        shipped = {name: resolve(f"zoo:{name}") for name in ZOO_DATA}
        assert sorted(written) == sorted(shipped)
        for name, path in written.items():
            with open(shipped[name], "rb") as file:
                assert path.read_bytes() == file.read(), f"{name}: rewrite it with write_data"
        assert sum(path.stat().st_size for path in written.values()) < 500_000

    def test_every_word_is_in_the_vocabulary(self):
        words = world.vocabulary()
        for name, data in ZOO_DATA.items():
            if data.kind == "text":
                with open(resolve(f"zoo:{name}"), encoding="utf-8") as file:
                    texts = file.read().splitlines()
            else:
                texts = [
                    text
                    for row in read_rows(name)
                    for value in row.values()
                    for text in (value if isinstance(value, list) else [str(value)])
                ]
            assert texts and all(word in words for text in texts for word in text.split()), name

    def test_fields_and_counts(self):
        fields = {
            "instructions": {"instruction", "input", "output"},
            "choices": {"context", "choices", "label"},
            "generation": {"prompt", "reference"},
        }
        counts = {"train": 180, "qa": 60, "generate-qa": 60, "generate-copy": 100}
        for name, data in ZOO_DATA.items():
            if data.kind == "text":
                continue
            rows = read_rows(name)
            assert len(rows) == counts.get(name, 200)
            assert all(set(row) == fields[data.kind] for row in rows)
            if data.kind == "choices":
                assert all(0 <= row["label"] < len(row["choices"]) == len(set(row["choices"])) for row in rows)

    def test_labels_are_right(self):
        for row in read_rows("arith"):
            a, _, b, _ = row["context"].split()
            assert row["choices"][row["label"]] == str(int(a) + int(b))
        for row in read_rows("copy"):
            assert f"copy : {row['choices'][row['label']]} >" == row["context"]
        for row in read_rows("agree"):
            plural = row["context"].split()[1] in world.PLURAL_NOUNS
            assert (row["choices"][row["label"]] in world.PLURAL_VERBS) == plural
        answers = {row["prompt"]: row["reference"] for row in read_rows("generate-qa")}
        for row in read_rows("qa"):
            assert answers[row["context"]] == row["choices"][row["label"]] + " ."

    def test_held_people_are_not_trained_on(self):
        trained = {word for row in read_rows("train") for word in row["instruction"].split()} & set(world.NAMES)
        held = {word for row in read_rows("qa") for word in row["context"].split()} & set(world.NAMES)
        assert trained == set(world.TRAIN_NAMES) and held == set(world.HELD_NAMES)
        assert not trained & held

    def test_text_is_the_validation_text(self):
        with open(resolve("zoo:text"), encoding="utf-8") as file:
            ids = make_tokenizer()(file.read().splitlines(), return_tensors="pt")["input_ids"]
        assert torch.equal(ids, validation_blocks())

    def test_sentences_repeat_by_seed(self):
        people = world.make_world()
        assert world.packed_sentences(people, 3, 5) == world.packed_sentences(people, 3, 5)
        assert world.packed_sentences(people, 3, 5) != world.packed_sentences(people, 4, 5)
        assert world.make_world(0) != world.make_world(1)
        assert {len(line.split()) for line in world.packed_sentences(people, 3, 50, words=20)} == {20}


class TestNames:
    def test_resolve(self):
        assert resolve("zoo:planted-llama") == str(zoo_path("planted-llama"))
        assert resolve("zoo:generate") == resolve("zoo:generate-qa")
        for other in ("gpt2", "./zoo", "data/zoo:train", ""):
            assert resolve(other) == other

    @pytest.mark.parametrize("name, hint", [("zoo:planted-lama", "'planted-llama'"), ("zoo:tran", "'train'")])
    def test_unknown_names_are_refused_with_the_nearest(self, name, hint):
        with pytest.raises(ConfigError) as error:
            resolve(name)
        message = str(error.value)
        assert f"Did you mean {hint}?" in message
        assert "zoo:planted-phi3" in message and "zoo:text" in message

    def test_names_load_nothing_heavy(self):
        code = (
            "import sys, tune.zoo.catalog; tune.zoo.catalog.resolve('zoo:train');"
            "print([m for m in ('torch', 'transformers', 'tokenizers', 'ray') if m in sys.modules])"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
