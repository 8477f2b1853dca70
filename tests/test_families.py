"""One network of each family goes through the chain, with random weights: training, export, serving, staging test."""
import shutil

import pytest
from conftest import QUICK, House


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224", "mobilevit_xxs"])
def test_a_family(empty: House, network: str):
    "A plain CNN, a mobile one, a vision transformer and a hybrid: the endpoint answers what was evaluated."
    settings = {"model_name": network, "pretrained": "none"}
    options = [word for name, value in settings.items() for word in ("--param", f"train.{name}={value}")]
    answer = empty("run", "--data", str(empty.archive), *QUICK, *options, "--param", "evaluate.min_accuracy=0",
                   "--approve")
    assert answer.status == 0, answer.err
    assert set(empty.statuses().values()) == {"succeeded"}
    (version,) = empty("models", "--json").json
    card = next(step for step in empty.newest()["steps"] if step["name"] == "train")["result"]
    assert card["model_name"] == network and version["accuracy"] > 0.2  # of six classes


@pytest.mark.slow
def test_networks_are_ranked(empty: House):
    "Pretrained networks come before one with random weights, and each row has its figures."
    networks = ["tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2", "resnet10t:none"]
    rows = empty("probe", *networks, "--data", str(empty.archive), "--json").json
    assert [row["network"] for row in rows] == [name.partition(":")[0] for name in networks]
    assert [row["image_size"] for row in rows[:3]] == [224, 240, 260]
    assert all(row["ms"] > 0 and row["megabytes"] > 1 for row in rows)
    assert max(rows, key=lambda row: row["log_loss"])["network"] == "resnet10t"
    table = empty("probe", *networks[:1], networks[3], "--data", str(empty.archive)).out
    assert table.index("tf_efficientnet_lite0") < table.index("resnet10t")


@pytest.mark.slow
def test_weights_come_from_a_file(empty: House):
    "The content of the file decides whether the training is done again; a package's own weights do as well."
    from safetensors.torch import save_file

    from intel_nb.training.backbone import build_model
    ours, renamed = empty.root / "ours.safetensors", empty.root / "renamed.safetensors"

    def train(weights) -> str:
        settings = "train.model_name=resnet10t", f"train.pretrained={weights}"
        answer = empty.run("--to", "train", *(word for one in settings for word in ("--param", one)))
        assert answer.status == 0 and "trained   head of resnet10t" in answer.out, answer.err
        return empty.statuses()["train"]

    save_file(build_model("resnet10t", 6, "none", seed=1).embed.network.state_dict(), ours)
    assert train("ours.safetensors") == "succeeded"
    step = next(step for step in empty.newest()["steps"] if step["name"] == "train")
    shutil.copy(ours, renamed)
    assert train(renamed) == "cached"
    save_file(build_model("resnet10t", 6, "none", seed=2).embed.network.state_dict(), ours)
    assert train(ours) == "succeeded"
    assert train(f"{step['out_dir']}/model/model.safetensors") == "succeeded"
    answer = empty.run("--to", "train", "--param", "train.model_name=resnet18", "--param", f"train.pretrained={ours}")
    assert answer.status == 2 and "ours.safetensors does not fit resnet18 (missing: " in answer.err
