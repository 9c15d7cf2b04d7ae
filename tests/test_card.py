"""The model card: metadata that the Hub takes, the recipe word for word, no local path, no guessed licence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from mechmerge.artifacts import read_document, write_json
from mechmerge.errors import InputError, SchemaError
from mechmerge.evaluate.gate import GateResult, RuleResult
from mechmerge.evaluate.record import Evaluation, PairTest
from mechmerge.models.references import ModelId
from mechmerge.publish.card import card_contents, hub_ids, make_card, write_card
from mechmerge.publish.licenses import ParentFacts, hub_lookup, languages_of_merge, license_of, license_of_merge
from mechmerge.publish.repository import Repository
from mechmerge.publish.results import eval_results, model_index
from mechmerge.publish.scores import pack_scores
from mechmerge.recipe.schema import Recipe, RecipeExpert, write_recipe
from tests.curve_samples import set_curves
from tests.hub import Hub
from tests.hub.accounts import WRITER
from tests.hub.runner import Runner
from tests.samples import BASE, EXPERTS, evaluation, recipe, score_file, whole_run

HUB = {
    name: ModelId(name=name, revision="c" * 40, shards={"model.safetensors": "3" * 64})
    for name in ("HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-360M-Instruct", "someone/unknown")
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return whole_run(tmp_path / "some-user" / "run")


def section(text: str, heading: str) -> str:
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_metadata_is_what_the_hub_reads(run: Path) -> None:
    card = ModelCard.load(write_card(run))
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "mergekit", "mechmerge"],
        "base_model": ["HuggingFaceTB/SmolLM2-135M-Instruct"],
        "base_model_relation": "merge",
        "language": ["en"],
        "model-index": [
            {
                "name": "conflict",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "formats (120 prompts)", "type": "mechmerge/formats", "split": "test"},
                        "metrics": [
                            {
                                "type": "pass_rate",
                                "value": 0.5,
                                "name": "formats",
                                "args": {"n": 120, "low": 0.41, "high": 0.59},
                            }
                        ],
                    }
                ],
            }
        ],
    }


def test_cards_pass_the_hubs_own_validation(lfs_hub: Hub, runner: Runner, run: Path, tmp_path: Path) -> None:
    card = write_card(run)
    pack_scores(run, tmp_path / "scores", "me/scores")
    code = (
        "import sys\nfrom huggingface_hub import DatasetCard, ModelCard\n"
        "ModelCard.load(sys.argv[1]).validate()\nDatasetCard.load(sys.argv[2]).validate()"
    )
    done = runner.python(code, card, tmp_path / "scores" / "README.md")
    assert done.code == 0, done.err
    assert [entry.path for entry in lfs_hub.requests()] == ["/api/validate-yaml"] * 2
    card.write_text(card.read_text().replace("base_model_relation: merge", "base_model_relation: nonsense"))
    refused = runner.python(code, card, card)
    assert refused.code == 1
    assert "base_model_relation" in refused.err


def test_the_card_is_at_the_runs_readme_unless_told_otherwise(run: Path, tmp_path: Path) -> None:
    assert write_card(run) == run / "README.md"
    other = write_card(run, out=tmp_path / "elsewhere" / "CARD.md")
    assert other.read_text("utf-8").startswith("---\n")


def test_the_recipe_stands_word_for_word(run: Path) -> None:
    path = run / "recipes" / "conflict" / "recipe.yaml"
    # What parsing and dumping again would lose: a comment, capitals, quotes.
    path.write_text(path.read_text("utf-8").replace("name: conflict", "name: 'conflict'  # Chosen BY HAND"), "utf-8")
    assert "BY HAND" in path.read_text("utf-8")
    block = re.search(r"```yaml\n(.*?)\n```", section(write_card(run).read_text("utf-8"), "Recipe"), re.S)
    assert block is not None
    assert block[1] + "\n" == path.read_text("utf-8")
    assert Recipe.model_validate(yaml.safe_load(block[1])) == read_document(Recipe, path)


def test_a_fence_inside_the_recipe_does_not_end_the_block(run: Path) -> None:
    odd = EXPERTS["formats"].model_copy(update={"name": "odd```name"})
    write_recipe(run / "recipes" / "odd" / "recipe.yaml", recipe(experts={"odd": RecipeExpert(model=odd)}))
    text = write_card(run, "odd").read_text("utf-8")
    assert "\n````yaml\n" in text


def test_no_local_path_reaches_the_card(run: Path) -> None:
    text = write_card(run).read_text("utf-8")
    for private in (str(run), run.parent.name, "some-user", str(Path.home()) + "/"):
        assert private not in text, private


def test_parents_stand_with_revision_and_digest(run: Path) -> None:
    parents = section(write_card(run).read_text("utf-8"), "Parents")
    for model in (BASE, *EXPERTS.values()):
        assert f"| {model.name} | {model.revision} | {model.digest[:16]} |" in parents
    assert "not identical to the weights on the Hub" in parents


def test_evaluation_with_intervals_and_the_gate(run: Path) -> None:
    rules = (
        RuleResult(
            rule="formats of conflict ≥ base",
            model="conflict",
            metric="formats",
            passed=False,
            found=0.5,
            bound=0.7,
            short_by=0.2,
        ),
        RuleResult(
            rule="formats of sum ≥ base", model="sum", metric="formats", passed=True, found=0.5, bound=0.5, short_by=0.0
        ),
    )
    write_json(run / "gate.json", GateResult(passed=False, rules=rules))
    said = section(write_card(run).read_text("utf-8"), "Evaluation")
    assert "| conflict | 0.50 [0.41, 0.59] |" in said
    assert "n = 120" in said
    assert "Gate: **refused**" in said
    assert "short by 0.200" in said
    assert "of sum" not in said


def test_a_model_that_was_not_evaluated_is_said_to_be_none(run: Path) -> None:
    assert "**sum itself was not evaluated**" in write_card(run, "sum").read_text("utf-8")
    (run / "evaluation.json").unlink()
    assert "nothing is known of what this merge does" in write_card(run).read_text("utf-8")


def test_only_figures_that_are_there_are_shown(run: Path, tmp_path: Path) -> None:
    assert "](figures/" not in write_card(run).read_text("utf-8")
    (run / "figures").mkdir()
    for name in ("effects.png", "curves.png", "another.png"):
        (run / "figures" / name).write_bytes(b"png")
    assert re.findall(r"\]\((figures/.*?)\)", write_card(run).read_text("utf-8")) == [
        "figures/effects.png",
        "figures/curves.png",
    ]
    assert "](figures/" not in write_card(run, out=tmp_path / "CARD.md").read_text("utf-8")


def test_a_doubtful_localization_is_labelled(run: Path) -> None:
    said = section(write_card(run).read_text("utf-8"), "Where the behaviours lie")
    assert "- ⚠ title: anchor not valid (separation 0.55 is below 0.8): not a recovery" in said
    assert "capitals" not in said
    score_file("capitals", curves=set_curves(above=False)).write(run / "scores" / "formats" / "capitals.safetensors")
    said = section(write_card(run).read_text("utf-8"), "Where the behaviours lie")
    assert "- ⚠ capitals: not above its controls (lift" in said


def test_the_pairs_are_this_models_against_its_parents(run: Path) -> None:
    record = evaluation("base", "formats", "arithmetic", "conflict")
    pairs = [
        PairTest(model=model, against=against, metric="formats", difference=0.1, low=0.0, high=0.2, better=9, worse=1, p=0.1,
                 p_holm=0.2)
        for model, against in (("conflict", "base"), ("conflict", "formats"), ("formats", "base"))
    ]  # fmt: skip
    record.model_copy(update={"pairs": tuple(pairs)}).write(run / "evaluation.json")
    said = section(write_card(run).read_text("utf-8"), "Evaluation")
    assert "This model against each parent" in said
    assert "| conflict | base | formats | +0.10 [+0.00, +0.20] |" in said
    assert "| conflict | formats | formats |" in said
    assert "| formats | base |" not in said


def test_parents_on_the_hub_are_linked_at_their_commit_and_given_to_the_command(run: Path) -> None:
    commit = "c" * 40
    hub = ModelId(name="HuggingFaceTB/SmolLM2-360M", revision=commit, shards={"model.safetensors": "3" * 64})
    local = ModelId(name="my-folder", shards={"model.safetensors": "4" * 64})
    merge = recipe(base=hub, experts={"a": RecipeExpert(model=hub), "b": RecipeExpert(model=local)})
    path = run / "recipes" / "hub" / "recipe.yaml"
    write_recipe(path, merge)
    contents = card_contents("hub", merge, path, None, "mit")._replace(repo="me/merge", folder="mechmerge/")
    text = make_card(contents)
    assert f"(https://huggingface.co/{hub.name}/tree/{commit})" in section(text, "Parents")
    command = section(text, "How to make it again")
    assert "mechmerge merge hf://me/merge/mechmerge/recipe.yaml OUT" in command
    assert f"--model base={hub.name}@{commit} " in command
    assert "--model b=FOLDER\n" in command
    assert ModelCard(text).data.base_model == [hub.name]


def of_ifeval(**changes: object) -> Evaluation:
    """An evaluation of IFEval's official prompts, all of them, with changes to how the suite was asked."""
    record = evaluation("conflict")
    result = record.models["conflict"].suites["formats"]
    formats = record.suites["formats"]
    units = {"ifeval": formats.units["formats"]}
    asked = {"ifeval": formats.model_copy(update={"split": "official", "units": units} | changes)}
    metrics = {"ifeval": result.metrics["formats"]}
    model = record.models["conflict"].model_copy(update={"suites": {"ifeval": result.model_copy(update={"metrics": metrics})}})
    return record.model_copy(update={"suites": asked, "models": {"conflict": model}})


def test_only_benchmarks_of_the_hub_are_claimed_as_such() -> None:
    assert eval_results(evaluation("conflict"), "conflict") is None, "a suite of our own is on no leaderboard"
    text = eval_results(of_ifeval(), "conflict")
    assert text is not None
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.value) == ("google/IFEval", 0.5)
    assert "n = 120" in (entry.notes or "")
    assert [result.dataset_type for result in model_index(of_ifeval(), "conflict")] == ["google/IFEval"]
    for change in ({"limited": True}, {"split": "file"}):
        assert eval_results(of_ifeval(**change), "conflict") is None, change
        assert [result.dataset_type for result in model_index(of_ifeval(**change), "conflict")] == ["mechmerge/ifeval"]


def test_shares_of_the_recipe(run: Path) -> None:
    said = section(write_card(run).read_text("utf-8"), "Recipe")
    # Heads 0 of 18, kv groups 6 of 6, neurons 114 of 120, of 10, 6 and 3 parameters: 378 of 576.
    assert "| conflict | conflict | formats | 1 | 0 | 0.0 % | 100.0 % | 95.0 % | 65.6 % |" in said
    assert "| conflict | conflict | arithmetic | 1 | 0 | 100 % | 100 % | 100 % | 100 % |" in said


@pytest.mark.parametrize("model", ["nonsense", None])
def test_which_recipe_must_be_clear(run: Path, model: str | None) -> None:
    (run / "run.yaml").unlink()
    with pytest.raises(InputError, match="conflict, sum"):
        write_card(run, model, license="mit")
    assert not (run / "README.md").exists()


def test_a_broken_recipe_or_evaluation_leaves_no_card(run: Path) -> None:
    (run / "evaluation.json").write_text('{"models": {}}')
    with pytest.raises(SchemaError):
        write_card(run)
    (run / "recipes" / "conflict" / "masks.safetensors").write_bytes(b"x")
    evaluation("base").write(run / "evaluation.json")
    with pytest.raises(SchemaError, match=r"masks\.safetensors"):
        write_card(run)
    assert not (run / "README.md").exists()


# ----------------------------------------------------------------------------------------------------------------- licence
def test_the_licence_follows_from_parents_that_agree() -> None:
    known = [HUB["HuggingFaceTB/SmolLM2-360M"], HUB["HuggingFaceTB/SmolLM2-360M-Instruct"]]
    assert license_of(BASE) == "apache-2.0"
    assert license_of_merge(known, None) == "apache-2.0"
    assert license_of_merge([*known, HUB["someone/unknown"]], "llama3.2") == "llama3.2"


@pytest.mark.parametrize("parent", [HUB["someone/unknown"], EXPERTS["formats"], ModelId(name="SmolLM2-360M")])
def test_a_licence_is_never_guessed(parent: ModelId) -> None:
    with pytest.raises(InputError, match=r"unknown; pass --license"):
        license_of_merge([BASE, parent], None)


def test_an_unknown_licence_is_demanded_from_the_user(run: Path) -> None:
    (run / "run.yaml").unlink()
    with pytest.raises(InputError, match="pass --license"):
        write_card(run, "conflict")
    card = ModelCard.load(write_card(run, "conflict", license="cc0-1.0"))
    assert card.data.license == "cc0-1.0"


def test_licence_and_language_are_read_from_the_parents_cards(lfs_hub: Hub) -> None:
    for name, license in (("base", "llama3.2"), ("expert", "llama3.2"), ("other", "other")):
        Repository(f"writer/{name}", endpoint=lfs_hub.url, token=WRITER).create(private=False)
        card = f"---\nlicense: {license}\nlanguage: [en, de]\n---\n# {name}\n"
        lfs_hub.push(f"writer/{name}", {"README.md": card.encode()})
    lookup = hub_lookup(lfs_hub.url, WRITER)
    parents = [ModelId(name="writer/base", revision="main"), ModelId(name="writer/base+writer/expert", revision="main+main")]
    assert license_of_merge(parents, None, lookup) == "llama3.2"
    assert languages_of_merge(parents, lookup) == ["en", "de"]
    for other in ("writer/other", "writer/nowhere"):
        with pytest.raises(InputError, match="unknown; pass --license"):
            license_of_merge([*parents, ModelId(name=other)], None, lookup)


def test_an_adapter_under_another_licence_makes_it_unknown() -> None:
    facts = {"a/base": ParentFacts("mit", ()), "a/adapter": ParentFacts("apache-2.0", ())}
    with pytest.raises(InputError, match="unknown"):
        license_of_merge([ModelId(name="a/base+a/adapter")], None, lambda name, _: facts.get(name))


# ----------------------------------------------------------------------------------------------------------- base_model ids
def test_base_model_names_models_of_the_hub_only() -> None:
    adapter = ModelId(name="owner/base+other/adapter")
    folder = ModelId(name="my-folder")
    models = [folder, HUB["someone/unknown"], adapter, BASE, EXPERTS["formats"], HUB["someone/unknown"]]
    assert hub_ids(models) == ["someone/unknown", "owner/base", "other/adapter", "HuggingFaceTB/SmolLM2-135M-Instruct"]


def test_without_parents_on_the_hub_no_base_model_is_named(run: Path) -> None:
    folder = ModelId(name="my-folder", shards={"model.safetensors": "3" * 64})
    write_recipe(run / "recipes" / "local" / "recipe.yaml", recipe(base=folder, experts={"e": RecipeExpert(model=folder)}))
    data = ModelCard.load(write_card(run, "local")).data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data
