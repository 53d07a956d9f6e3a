"""What the chat page asks of a server, which is played here."""

import json

from look import Look

from veneer.serve.page import PAGE


def test_a_question_without_an_answer_is_not_asked_again_with_the_next(browser):
    look, asked = Look(browser, 390, "dark"), {"gone": [], "here": []}

    def answer(route):
        path = route.request.url.rpartition("localhost/")[2]
        if path == "":
            return route.fulfill(body=PAGE, content_type="text/html")
        if path == "v1/models":
            return route.fulfill(json={"data": [{"id": "gone"}, {"id": "here"}]})
        body = json.loads(route.request.post_data)
        asked[body["model"]].append([m["content"] for m in body["messages"]])
        if body["model"] == "gone":
            return route.fulfill(status=404, json={"error": {"message": "there is no model 'gone' here"}})
        event = json.dumps({"choices": [{"delta": {"content": "yes"}}]})
        return route.fulfill(body=f"data: {event}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    page = look.page
    page.route("**/*", answer)
    page.goto("http://localhost/")
    page.wait_for_function("document.querySelector('[data-side=\"1\"]').value === 'here'")
    for question in ("one", "two"):
        page.fill("#say", question)
        page.click("#send")
        page.wait_for_function("document.querySelector('#send').textContent === 'Send'")
    assert asked == {"gone": [["one"], ["two"]], "here": [["one"], ["one", "yes", "two"]]}
    faults = page.locator("section:first-child .fault").all_text_contents()
    assert faults == ["there is no model 'gone' here"] * 2
    assert look.overflow() == [] and look.low_contrast() == []
    look.context.close()
