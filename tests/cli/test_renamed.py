"""Options of version 0.0 on the command line and in files: the error names the new option."""

import pytest


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--data.roles={customer: user}", "data.roles is called data.role_map now"),
        ("--data.order=x", "data.order is called data.order_column now"),
        ("--model.lora.adapter=x", "model.lora.adapter is called model.lora.init_from now"),
        ("--model.lora.rank=8", "did you mean model.lora.r?"),  # neither an old option nor an abbreviation
    ],
)
def test_an_old_option_is_an_error_with_the_new_name(cli, option, hint):
    refused = cli("fit", "--model.base=x", option, code=2)
    assert hint in refused.text.splitlines()
    assert "Traceback" not in refused.text


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("data: {overlong: split}", "data.overlong is called data.truncation now"),
        ("monitor: {forgetting: false}", "monitor.forgetting is called monitor.base_drift now"),
    ],
)
def test_an_old_key_of_a_file_is_an_error_with_the_new_name(cli, tmp_path, text, hint):
    (tmp_path / "old.yaml").write_text(f"{text}\n")
    refused = cli("fit", "--config=old.yaml", code=2)
    assert hint in refused.text.splitlines()
    assert "Traceback" not in refused.text
