"""Forms of the rows of examples: the columns that trainers and data sets of others have."""

from typing import Any, Literal, get_args

Form = Literal["alpaca", "messages", "prompt-completion"]
FORMS: tuple[Form, ...] = get_args(Form)


def example_columns(form: Form, instruction: str, response: str) -> dict[str, Any]:
    """Columns of one example.

    Trainers append a completion to its prompt, so that the prompt ends with a newline.
    """
    if form == "messages":
        return {
            "messages": [
                {"role": "user", "content": instruction},
                {"role": "assistant", "content": response},
            ]
        }
    if form == "prompt-completion":
        return {"prompt": f"{instruction}\n", "completion": response}
    return {"instruction": instruction, "input": "", "output": response}
