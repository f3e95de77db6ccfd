import pytest
from omegaconf import OmegaConf

from src.utils.instantiate import instantiate_all

FRACTION = {"_target_": "fractions.Fraction", "numerator": 1, "denominator": 2}


def test_order_is_kept_and_null_left_out() -> None:
    group = OmegaConf.create({"b": FRACTION, "off": None, "a": {**FRACTION, "numerator": 3}})
    assert [fraction.numerator for fraction in instantiate_all(group, "callbacks")] == [1, 3]


def test_a_single_config_is_a_list_of_one() -> None:
    assert len(instantiate_all(OmegaConf.create(FRACTION), "logger")) == 1


def test_no_group_is_nothing() -> None:
    assert instantiate_all(None, "logger") == []
    assert instantiate_all(OmegaConf.create({}), "logger") == []


@pytest.mark.parametrize("entry", [{"numerator": 1}, "fractions.Fraction", 3])
def test_an_entry_without_target_is_named(entry: object) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.wrong has no _target_"):
        instantiate_all(OmegaConf.create({"wrong": entry}), "callbacks")


def test_only_a_local_store_keeps_artifacts_in_a_folder_of_ours(tracking_uri: str) -> None:
    from src.utils.tracking import mlflow_logger

    settings = {"experiment_name": "e", "artifact_location": "file:///here"}
    assert mlflow_logger(tracking_uri, **settings)._artifact_location == "file:///here"
    assert mlflow_logger("http://localhost:5000", **settings)._artifact_location is None
