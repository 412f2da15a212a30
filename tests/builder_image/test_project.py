from __future__ import annotations

from pathlib import Path

import pytest

from builder_image import lock, project
from registry.errors import UserError

SERVICE = "import bentoml\n\n@bentoml.service\nclass Mine:\n    pass\n"


def make(tmp_path: Path, **files: str) -> project.Project:
    places = {}
    for name, content in files.items():
        path = name.replace("__", "/").replace("_py", ".py").replace("_yaml", ".yaml").replace("_toml", ".toml")
        path = path.replace("_txt", ".txt")
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
        places[path] = tmp_path / path
    return project.of_files(places)


def test_bentofile_says_service_packages_and_python(tmp_path: Path) -> None:
    options = "service: 'service:Mine'\npython: {packages: [six, 'packaging>=20']}\ndocker: {python_version: '3.12'}\n"
    wishes = project.read(make(tmp_path, bentofile_yaml=options, service_py=SERVICE))
    assert wishes == project.Wishes("service:Mine", ("six", "packaging>=20"), (), "3.12")


def test_pyproject_gives_its_dependencies(tmp_path: Path) -> None:
    text = '[project]\nname = "x"\ndependencies = ["six"]\n[tool.bentoml.build]\nservice = "service:Mine"\n'
    wishes = project.read(make(tmp_path, pyproject_toml=text, service_py=SERVICE))
    assert (wishes.service, wishes.packages) == ("service:Mine", ("six",))


def test_bentomls_image_api_is_read_without_running_it(tmp_path: Path) -> None:
    source = (
        "import bentoml\nraise SystemExit('nobody may run this')\n"
        "image = bentoml.images.Image(python_version='3.12').python_packages('six', 'idna')\\\n"
        "    .requirements_file('r.txt')\n"
        "image.python_packages('packaging')\n"
    )
    wishes = project.read(make(tmp_path, service_py=source))
    assert wishes.service == "service"
    assert set(wishes.packages) == {"six", "idna", "packaging"}
    assert (wishes.files, wishes.python) == (("r.txt",), "3.12")


def test_an_archive_that_wraps_all_in_one_folder_is_unwrapped(tmp_path: Path) -> None:
    found = make(tmp_path, mine__bentofile_yaml="service: 'service:Mine'\n", mine__service_py=SERVICE, notes_txt="")
    assert sorted(found.files) == ["bentofile.yaml", "service.py"]


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("docker: {system_packages: [git]}", "docker.system_packages"),
        ("docker: {setup_script: ./setup.sh}", "docker.setup_script"),
        ("docker: {dockerfile_template: ./D.j2}", "docker.dockerfile_template"),
        ("docker: {cuda_version: '12.1'}", "docker.cuda_version"),
        ("docker: {base_image: 'ubuntu:24.04'}", "docker.base_image"),
        ("conda: {dependencies: [numpy]}", "conda"),
    ],
)
def test_what_layers_cannot_do_is_refused_by_name_with_the_way_out(tmp_path: Path, option: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        project.read(make(tmp_path, bentofile_yaml=f"service: 'service:Mine'\n{option}\n", service_py=SERVICE))
    assert caught.value.code == "needs_dockerfile"
    assert named in caught.value.detail
    assert "containerize" in str(caught.value.hint)


@pytest.mark.parametrize("call", ["system_packages('git')", "run('make')", "run_script('x.sh')"])
def test_image_calls_that_layers_cannot_do_are_refused(tmp_path: Path, call: str) -> None:
    source = f"import bentoml\nimage = bentoml.images.Image().python_packages('six').{call}\n"
    with pytest.raises(UserError) as caught:
        project.read(make(tmp_path, service_py=source))
    assert caught.value.code == "needs_dockerfile"


def test_another_librarys_run_is_not_taken_for_an_images(tmp_path: Path) -> None:
    source = "import subprocess, bentoml\ndef main():\n    subprocess.run(['true'])\n"
    assert project.read(make(tmp_path, service_py=source)).packages == ()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ("service: 'service:Mine'\npython: {index_url: 'https://example.org/simple'}\n", "bad_requirements"),
        ("service: 'service:Mine'\npython: {wheels: [x.whl]}\n", "bad_requirements"),
        ("service: 'service:Mine'\nmodels: ['tiny:latest']\n", "needs_model_store"),
        ("service: 'service:Mine'\npython: {requirements_txt: '../../etc/passwd'}\n", "bad_project"),
        ("- a\n- list\n", "bad_project"),
        ("{ not yaml", "bad_project"),
        ("name: nothing\n", "service_not_found"),
    ],
)
def test_each_bad_bentofile_has_its_own_code(tmp_path: Path, options: str, code: str) -> None:
    with pytest.raises(UserError) as caught:
        project.read(make(tmp_path, bentofile_yaml=options))
    assert caught.value.code == code


def test_source_with_a_syntax_error_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        project.read(make(tmp_path, service_py="def broken(:\n"))
    assert caught.value.code == "service_import_failed"
    assert "line 1" in caught.value.detail


def test_a_folder_without_any_service_is_no_project(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make(tmp_path, model_txt="tree")
    assert caught.value.code == "bad_project"


def test_a_project_that_names_no_bentoml_gets_that_of_the_kinds() -> None:
    bentos = Path(__file__).resolve().parents[2] / "bentos"
    locks = [lock.parse(file.read_text()) for file in bentos.glob("*/requirements.txt")]
    assert {each.version("bentoml") for each in locks} == {project.BENTOML}
