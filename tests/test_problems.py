import pytest

from itemvec import errors
from itemvec.errors import FieldError, InvalidItem, ItemvecError, StoreUnavailable
from service import problems
from service.problems import MAX_ERRORS, STATUS, InvalidRequest, MethodNotAllowed, Unauthorized, problem


def test_every_error_of_the_tree_has_a_status_of_its_own_or_of_a_parent() -> None:
    kinds = [
        k for m in (errors, problems) for k in vars(m).values() if isinstance(k, type) and issubclass(k, ItemvecError)
    ]
    assert len(kinds) > 20
    for kind in kinds:
        assert any(parent in STATUS for parent in kind.__mro__), kind


def test_a_problem_is_what_rfc_9457_says() -> None:
    made = problem(InvalidItem([FieldError("/input/1/price", "expected a number")]), "id-1", "/v1/embeddings")
    assert made.status == 422
    assert made.body == {
        "type": "urn:itemvec:problem:invalid-item",
        "title": "Invalid item",
        "status": 422,
        "detail": "/input/1/price: expected a number",
        "request_id": "id-1",
        "instance": "/v1/embeddings",
        "errors": [{"pointer": "/input/1/price", "detail": "expected a number"}],
    }


def test_many_errors_are_counted_and_the_first_are_listed() -> None:
    made = problem(InvalidRequest(FieldError(f"/{i}", "is wrong") for i in range(5000)), "id-1")
    assert len(made.body["errors"]) == MAX_ERRORS
    assert made.body["detail"] == "/0: is wrong (and 4999 more)"


def test_an_error_that_was_not_meant_keeps_its_text_to_itself() -> None:
    made = problem(KeyError("/etc/secret"), "id-1")
    assert (made.status, made.body["title"]) == (500, "Internal error")
    assert "secret" not in str(made.body)
    assert "id-1" in made.body["detail"]


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (1.0, "1"), (4.2, "5")])
def test_a_caller_is_told_when_to_come_back_in_whole_seconds(seconds: float, header: str) -> None:
    made = problem(StoreUnavailable("Redis is down", retry_after=seconds), "id-1")
    assert (made.status, made.headers) == (503, {"Retry-After": header})


def test_headers_that_http_asks_for() -> None:
    assert problem(Unauthorized(), "id-1").headers == {"WWW-Authenticate": 'Bearer realm="itemvec"'}
    assert problem(MethodNotAllowed("PATCH", {"PUT", "GET"}), "id-1").headers == {"Allow": "GET, PUT"}
