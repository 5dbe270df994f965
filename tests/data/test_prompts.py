from jaxvaccine.data.prompts import Example, format_prompt


def test_prompt_without_input_is_the_papers():
    """Alpaca's, and the line break that both programs put behind it."""
    assert format_prompt("Name a colour.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Response:\n"
    )


def test_prompt_with_input_is_the_papers():
    assert format_prompt("Translate.", "Grüße") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nTranslate.\n\n### Input:\nGrüße\n\n### Response:\n"
    )


def test_plain_is_nothing_but_line_breaks():
    assert format_prompt("Name a colour.", prompt="plain") == "Name a colour.\n"
    assert format_prompt("Translate {input}.", "Grüße", "plain") == "Translate {input}.\nGrüße\n"


def test_braces_in_the_text_are_text():
    assert "### Instruction:\nFill {input} and {0}\n\n" in format_prompt("Fill {input} and {0}", "{instruction}")


def test_example_needs_only_an_instruction():
    assert Example("a") == ("a", "", "")
