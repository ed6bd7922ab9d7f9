from training.baselines import BASELINES
from training.findings import best_rival, better, findings

COLUMN = {
    "kind": "multi",
    "metric": "micro-F1",
    "score": 0.8,
    "inferred": 0.4,
    "majority": 0.3,
    "pca": 0.6,
    "loss": 0.4,
}
GOOD = {
    "columns": {"genres": COLUMN},
    "retrieval": {
        "k": 10,
        "columns": {"genres": {"precision": 0.6, "base_rate": 0.2, **dict.fromkeys(BASELINES, 0.5)}},
        "mean": {"precision": 0.6, "base_rate": 0.2, **dict.fromkeys(BASELINES, 0.5)},
        "prefixes": {"16": {"precision": 0.5, "pca": 0.4}, "32": {"precision": 0.6, "pca": 0.5}},
    },
    "cold_start": None,
    "out_of_vocabulary": {"columns": {}, "share": 0.1, "precision": 0.55, "precision_of_others": 0.6},
    "space": {"norm_mean": 1.0, "norm_std": 0.1, "effective_rank": 20.0, "mean_cosine": 0.01},
    "parent": None,
    "training": {"history": [{"validation": {"total": 1.0}}, {"validation": {"total": 0.999}}]},
}


def bad(**changed):
    return " ".join(finding.text for finding in findings({**GOOD, **changed}) if not finding.good)


def test_a_good_model_has_nothing_against_it():
    assert bad() == ""
    assert len(findings(GOOD)) == 3


def test_a_baseline_that_finds_better_neighbors_is_named_with_its_figure():
    column = {**GOOD["retrieval"]["columns"]["genres"], "pca_unit_variance": 0.7}
    said = bad(retrieval={**GOOD["retrieval"], "mean": column, "columns": {"genres": column}})
    assert "precision@10 0.600, the best baseline (PCA, unit variance) 0.700" in said
    assert "genres (0.600 against 0.700)" in said


def test_what_is_worse_comes_first():
    found = findings({**GOOD, "space": {**GOOD["space"], "effective_rank": 3.0}})
    assert [finding.good for finding in found] == [False, True, True, True]
    assert found[0].text == "Only 3.0 of 32 dimensions are in use." and found[0].advice


def test_each_figure_of_a_cold_start_is_judged_alone():
    level = {"recall": 0.2, "ndcg": 0.1, "pm_auc": 0.6}
    cold = {
        "k": 20,
        **dict.fromkeys((*BASELINES, "chance"), level),
        "model": {**level, "recall": 0.3, "pm_auc": 0.5},
    }
    found = [finding for finding in findings({**GOOD, "cold_start": cold}) if "New items" in finding.text]
    assert {finding.text.split(": ")[1].split(" ")[0]: finding.good for finding in found} == {
        "recall@20": True,
        "NDCG@20": True,
        "popularity-matched": False,
    }


def test_a_column_that_says_no_more_than_its_majority_is_named():
    useless = {**COLUMN, "score": 0.2, "loss": 1.0}
    assert "no more of these columns than the most frequent answer: tags" in bad(columns={"tags": useless})


def test_a_column_that_pca_reads_back_better_is_named_and_an_error_is_better_when_it_is_small():
    assert "PCA of the same size reads these columns back better: tags" in bad(columns={"tags": {**COLUMN, "pca": 0.9}})
    rating = {**COLUMN, "metric": "mean error in steps", "score": 0.5, "majority": 1.2, "pca": 0.7}
    assert bad(columns={"rating": rating}) == ""
    assert better("mean error in steps", 0.5, 0.7) and better("accuracy", 0.7, 0.5)


def test_unseen_labels_that_cost_neighbors_a_mean_that_is_left_in_and_other_neighbors_are_told():
    assert "precision 0.300" in bad(out_of_vocabulary={**GOOD["out_of_vocabulary"], "precision": 0.3})
    assert "mean cosine is 0.60" in bad(space={**GOOD["space"], "mean_cosine": 0.6})
    assert "Only 12% of the 10 nearest are those of version 4" in bad(parent={"version": 4, "k": 10, "overlap": 0.12})


def test_a_loss_that_still_falls_is_told():
    assert "fell by 20.0%" in bad(training={"history": [{"validation": {"total": loss}} for loss in (1.0, 0.8)]})


def test_the_best_rival_is_the_largest_figure_of_a_baseline():
    assert best_rival({**dict.fromkeys(BASELINES, 0.1), "svd": 0.3, "precision": 0.9}) == ("svd", 0.3)
