"""A client without generated code finds and calls everything, as grpcurl does."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha import reflection_pb2 as reflection
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from wire import CALL_S, Wire

SERVICES = {
    "mlxd.v1.InferenceService",
    "mlxd.v1.ModelService",
    "mlxd.v1.SessionService",
    "mlxd.v1.ServerService",
    "grpc.health.v1.Health",
}


def call(wire: Wire, pool: Any, service: str, method: str, request: dict[str, Any]) -> Any:
    """Calls a method known only from its descriptor; JSON in, JSON out."""
    found = pool.FindServiceByName(service).FindMethodByName(method)
    kinds = [message_factory.GetMessageClass(m) for m in (found.input_type, found.output_type)]
    stub = wire.channel.unary_unary(
        f"/{service}/{method}",
        request_serializer=kinds[0].SerializeToString,
        response_deserializer=kinds[1].FromString,
    )
    reply = stub(json_format.ParseDict(request, kinds[0]()), timeout=CALL_S)
    return json_format.MessageToDict(reply, preserving_proto_field_name=True)


def test_capabilities_are_found_and_called_by_name(wire: Wire) -> None:
    database = ProtoReflectionDescriptorDatabase(wire.channel)
    assert set(database.get_services()) >= SERVICES
    pool = descriptor_pool.DescriptorPool(database)
    reply = call(wire, pool, "mlxd.v1.ServerService", "Capabilities", {"models": ["tiny"]})
    assert reply["server"]["device"]
    assert "llama" in reply["server"]["architectures"]
    assert reply["models"][0]["model"]["name"] == "tiny"


def test_text_is_generated_by_name(wire: Wire) -> None:
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(wire.channel))
    request = {"model": "tiny", "prompt": "The harbour", "stopping": {"max_tokens": 3}}
    reply = call(wire, pool, "mlxd.v1.InferenceService", "Generate", request)
    assert 1 <= reply["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_both_versions_of_reflection_answer(wire: Wire, version: str) -> None:
    # The two packages have the same messages.
    stub = wire.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection.ServerReflectionResponse.FromString,
    )
    asked = iter([reflection.ServerReflectionRequest(list_services="")])
    (reply,) = list(stub(asked, timeout=CALL_S))
    assert {entry.name for entry in reply.list_services_response.service} >= SERVICES
