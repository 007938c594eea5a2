"""Configs by name: a file that exists is always meant before one that comes with phase8."""

import pytest

from phase8.config.load import load_config
from phase8.config.shipped import config_file, shipped_configs, shipped_names
from phase8.errors import ConfigError


@pytest.mark.parametrize("name", ["phase8_1b", "phase8_1b.yaml", "configs/phase8_1b.yaml", "configs/phase8_1b"])
def test_a_name_is_the_config_that_comes_with_phase8(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).run.name == "phase8_1b"


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phase8_1b.yaml").write_text("run: {name: mine}\n")
    assert load_config("phase8_1b.yaml").run.name == "mine"
    assert load_config("phase8_1b").run.name == "phase8_1b"


def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phase8_1b.yaml").symlink_to("absent")
    with pytest.raises(ConfigError, match=r"Config file phase8_1b\.yaml does not exist"):
        load_config("phase8_1b.yaml")


@pytest.mark.parametrize("name", ["other/phase8_1b.yaml", "phase8_1b.yml", "/phase8_1b.yaml", "phase8_2b"])
def test_another_path_is_only_itself(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    names = ", ".join(shipped_names())
    sentence = f"Config file {name} does not exist; give a YAML file with --config, or one that comes with phase8: {names}."
    assert caught.value.problems == [sentence] and "phase8_1b, " in names


def test_an_installed_package_has_them_beside_its_doors(tmp_path, monkeypatch):
    monkeypatch.setattr("phase8.config.shipped._PACKAGE", tmp_path / "phase8")
    for folder in ("configs", "phase8/doors/configs"):  # the first: of another package beside it
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "phase8/doors/configs/mine.yaml").touch()
    assert shipped_names() == ["mine"] and config_file(shipped_configs() / "mine.yaml").is_file()


def test_a_name_that_no_file_can_have_is_one_sentence():
    with pytest.raises(ConfigError, match=r"^Config file x+ cannot be read \(File name too long\)"):
        load_config("x" * 300)
