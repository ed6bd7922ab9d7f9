from html.parser import HTMLParser

from training.plots import INK, loss_curves


def history(columns, epochs=3):
    def losses(epoch):
        return {"total": 2.0 - epoch / 10, **{f"reconstruct.{name}": 1.0 - epoch / 10 for name in columns}}

    return [{"epoch": n, "train": losses(n), "validation": losses(n)} for n in range(1, epochs + 1)]


class Texts(HTMLParser):
    def __init__(self, drawn):
        super().__init__()
        self.all = []
        self.feed(drawn)

    def handle_data(self, data):
        self.all.append(data.strip())


def test_every_column_is_in_the_legend_however_many_and_long():
    columns = [f"a column with a rather long name, number {n}" for n in range(17)] + [
        "_hidden",
        "price in $ and $ again",
    ]
    texts = Texts(loss_curves(history(columns))).all
    assert sum(text.startswith("a column with a rather long") for text in texts) == 17
    assert "_hidden" in texts and "price in $ and $ again" in texts


def test_text_has_the_color_of_the_page_and_there_is_no_background():
    drawn = loss_curves(history(["genres"]))
    assert drawn.startswith("<svg") and "currentColor" in drawn and INK not in drawn
    assert "#ffffff" not in drawn


def test_the_same_losses_give_the_same_bytes():
    assert loss_curves(history(["genres"])) == loss_curves(history(["genres"]))


def test_a_run_without_columns_to_read_back_has_one_picture():
    texts = Texts(loss_curves(history([]))).all
    assert "Sum of the objectives" in texts
    assert not any(text.startswith("Columns") for text in texts)
