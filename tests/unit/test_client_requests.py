"""From keyword arguments to request messages, and what is refused before anything is sent."""

import pytest

import kvserve
from kvserve.testing import AsyncMockTransport, MockTransport, events
from kvserve.v1 import common_pb2, generate_pb2


def sent(text=None, **options):
    """Return the request that these arguments make."""
    transport = MockTransport(lambda method, request: events("x"))
    with kvserve.Client(transport=transport) as client, client.generate(text, **options) as stream:
        stream.collect()
    return transport.requests[0]


def test_what_is_not_given_stays_absent():
    assert sent("hello") == generate_pb2.GenerateRequest(text="hello")


def test_none_is_absent_and_zero_is_zero():
    request = sent("x", temperature=0.0, top_k=None, seed=0)
    assert request.parameters.HasField("temperature")
    assert request.parameters.HasField("seed")
    assert not request.parameters.HasField("top_k")


def test_every_argument_has_its_place():
    request = sent(
        token_ids=[5, 8, 13],
        model="m",
        request_id="r",
        priority=-3,
        max_new_tokens=4,
        min_new_tokens=1,
        temperature=0.5,
        top_k=7,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=1.0,
        seed=2**62,
        stop=["a", "b"],
        stop_token_ids=[9],
        ignore_eos=True,
        logit_bias={3: -1.5},
        logprobs=2,
        n=3,
        kv_cache=False,
        read_prefix=False,
        write_prefix=True,
        lifetime_s=1.5,
    )
    parameters = generate_pb2.GenerationParameters(
        max_new_tokens=4,
        min_new_tokens=1,
        temperature=0.5,
        top_k=7,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=1.0,
        seed=2**62,
        stop=["a", "b"],
        stop_token_ids=[9],
        ignore_eos=True,
        logit_bias=[generate_pb2.LogitBias(token_id=3, bias=-1.5)],
        logprobs=2,
        n=3,
    )
    cache = generate_pb2.CacheOptions(kv_cache=False, read_prefix=False, write_prefix=True)
    cache.lifetime.FromMilliseconds(1500)
    assert request == generate_pb2.GenerateRequest(
        model="m",
        token_ids=common_pb2.TokenIds(ids=[5, 8, 13]),
        parameters=parameters,
        cache=cache,
        request_id="r",
        priority=-3,
    )


def test_messages_may_be_mappings_or_chat_messages():
    request = sent(
        messages=[{"role": "system", "content": "Be brief."}, kvserve.ChatMessage("user", "Hi")],
        add_generation_prompt=False,
    )
    assert [(m.role, m.content) for m in request.chat.messages] == [("system", "Be brief."), ("user", "Hi")]
    assert request.chat.add_generation_prompt is False


def test_one_stop_string_is_not_taken_apart():
    assert sent("x", stop="END").parameters.stop == ["END"]


def test_empty_inputs_are_sent_for_the_server_to_judge():
    assert sent("").WhichOneof("input") == "text"
    assert sent(token_ids=[]).WhichOneof("input") == "token_ids"
    assert sent(messages=[]).WhichOneof("input") == "chat"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_new_tokens": 2**40 + 5}, "parameters.max_new_tokens"),
        ({"seed": 2**63}, "parameters.seed"),
        ({"stop": ["\ud800"]}, "parameters.stop"),
        ({"stop_token_ids": [2**31]}, "parameters.stop_token_ids"),
        ({"logit_bias": {2**31: 0.0}}, "parameters.logit_bias"),
        ({"lifetime_s": float("nan")}, "cache.lifetime"),
        ({"lifetime_s": float("inf")}, "cache.lifetime"),
        ({"lifetime_s": 1e30}, "cache.lifetime"),
        ({"priority": -(2**31) - 1}, "priority"),
        ({"request_id": "\udcff"}, "request_id"),
    ],
)
def test_a_value_that_no_message_can_hold_names_its_field(options, field):
    with pytest.raises(kvserve.InvalidArgument) as caught:
        sent("x", **options)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert field in str(caught.value)


def test_prompts_that_no_message_can_hold_name_their_field():
    with pytest.raises(kvserve.InvalidArgument, match="text: is not valid Unicode"):
        sent("\ud800")
    with pytest.raises(kvserve.InvalidArgument, match=r"token_ids.ids: "):
        sent(token_ids=[2**31])
    with pytest.raises(kvserve.InvalidArgument, match=r"chat.messages\[1\]: "):
        sent(messages=[{"role": "user", "content": "a"}, {"role": "user", "content": "\ud800"}])


def test_wrong_types_are_type_errors_that_name_the_field():
    with pytest.raises(TypeError, match=r"parameters.temperature"):
        sent("x", temperature="hot")
    with pytest.raises(TypeError, match=r"chat.messages\[0\].*role and content"):
        sent(messages=[{"role": "user"}])


def test_exactly_one_prompt():
    with pytest.raises(TypeError, match="exactly one of text, token_ids, messages; got none"):
        sent()
    with pytest.raises(TypeError, match="got text, token_ids"):
        sent("x", token_ids=[1])


def test_a_mistyped_argument_is_refused_with_a_hint():
    with pytest.raises(TypeError, match=r"generate\(\) got .* 'max_tokens'; did you mean 'max_new_tokens'"):
        sent("x", max_tokens=3)


def test_tokenize_arguments():
    transport = MockTransport(lambda method, request: generate_pb2.TokenizeResponse(token_ids=[1]))
    with kvserve.Client(transport=transport) as client:
        client.tokenize("x", add_special_tokens=False)
        client.tokenize(messages=[kvserve.ChatMessage("user", "Hi")], add_generation_prompt=False)
        with pytest.raises(TypeError, match="exactly one of text, messages"):
            client.tokenize()
    first, second = transport.requests
    assert first == generate_pb2.TokenizeRequest(text="x", add_special_tokens=False)
    assert second.chat.add_generation_prompt is False


async def test_async_client_takes_the_same_arguments():
    transport = AsyncMockTransport(lambda method, request: events("a", "b", cached_tokens=4))
    async with (
        kvserve.AsyncClient(transport=transport, api_key="k") as client,
        client.generate("x", max_new_tokens=2) as stream,
    ):
        result = await stream.collect()
    assert result.text == "ab"
    assert result.usage.cached_tokens == 4
    assert transport.requests == [sent("x", max_new_tokens=2)]
    assert transport.metadata[0]["authorization"] == "Bearer k"


async def test_mock_transport_shows_what_was_cancelled():
    transport = AsyncMockTransport(lambda method, request: events("a", "b"))
    async with kvserve.AsyncClient(transport=transport) as client:
        async with client.generate("x") as stream:
            async for _ in stream:
                break
        async with client.generate("y") as stream:
            await stream.collect()
    assert [stream.is_cancelled for stream in transport.streams] == [True, False]


def test_mock_transport_can_refuse_and_break_off():
    def broken(method, request):
        yield events("a", "b")[0]
        raise kvserve.Unavailable("engine lost")

    with kvserve.Client(transport=MockTransport(broken)) as client, client.generate("x") as stream:
        with pytest.raises(kvserve.Unavailable, match="engine lost"):
            stream.collect()
        assert stream.text == "a"


def test_logprobs_and_newer_finish_reasons():
    message = generate_pb2.GenerateResponse(
        samples=[
            generate_pb2.Sample(
                index=1, token_ids=[4], finish_reason=generate_pb2.FINISH_REASON_STOP_TOKEN, stop_reason="!"
            ),
            generate_pb2.Sample(
                index=0,
                text="t",
                token_ids=[3],
                finish_reason=99,  # type: ignore[arg-type]
                logprobs=[
                    generate_pb2.TokenLogprobs(
                        chosen=generate_pb2.TokenLogprob(token_id=3, logprob=-0.5),
                        top=[generate_pb2.TokenLogprob(token_id=2, logprob=-0.25)],
                    )
                ],
            ),
        ]
    )
    with kvserve.Client(transport=MockTransport(lambda *_: message)) as client:
        result = client.generate_once("x")
    assert result.text == "t"
    assert result.finish_reason is kvserve.FinishReason.OTHER
    assert result.logprobs == (
        kvserve.TokenLogprobs(kvserve.TokenLogprob(3, -0.5), (kvserve.TokenLogprob(2, -0.25),)),
    )
    assert result.samples[1].stop_reason == "!"


def test_an_answer_without_a_sample_is_an_error():
    transport = MockTransport(lambda *_: generate_pb2.GenerateResponse())
    with kvserve.Client(transport=transport) as client, pytest.raises(kvserve.Internal, match="no sample"):
        client.generate_once("x")
