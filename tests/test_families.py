"""One network of each family goes through the chain, with random weights: training, export, serving, staging test."""
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
