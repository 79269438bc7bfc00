"""Which test provokes each entry of the catalogue for real: over sockets, with processes, on disks.

tests/conftest.py listens while one of these runs, and fails it when its entry was not said; tests/test_catalogue.py
sees to it that every entry has one, and that the tests are there.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from engine_plugin.failures import Entry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["PROVOKED", "due", "listening"]

PROVOKED: Mapping[str, str] = {
    "engine-not-running": "engines/openvino/driver/test_life.py::test_start_after_a_stop_loads_no_models",
    "server-unreachable": "engines/ollama/attached/test_attached.py::test_closed_port_gives_no_server",
    "engine-not-installed": "engines/openvino/software/test_software.py::test_missing_software_is_reported",
    "own-software-unusable": "engines/ollama/software/test_installing.py::test_program_named_in_manifest_is_used",
    "software-too-old": "engines/ollama/attached/test_attached.py::test_old_server_is_rejected_with_both_versions",
    "device-missing": "engines/openvino/driver/test_life.py::test_mode_gpu_without_a_gpu_is_rejected",
    "model-missing": "models/test_store.py::test_not_found_suggests_near_names",
    "default-model-missing": "models/test_defaults.py::test_error_for_missing_default_model_names_its_file",
    "model-kind-mismatch": "engines/openvino/driver/test_services.py::test_model_of_another_kind_is_rejected",
    "disk-full": "models/test_store.py::test_full_disk_fails_before_the_copy",
    "disk-filled": "models/test_folders.py::test_disk_that_fills_during_the_copy",
    "disk-write-refused": "test_catalogue.py::test_unwritable_directory_is_reported",
    "memory-insufficient": "engines/openvino/driver/test_memory.py::test_model_beyond_the_memory_limit_is_rejected",
    "queue-full": "engines/test_admission.py::test_request_beyond_max_queue_is_rejected",
    "context-exceeded": "engines/openvino/driver/test_services.py::test_prompt_beyond_the_context_is_rejected",
    "port-taken": "lifecycle/test_start.py::test_holder_of_repeatedly_taken_ports_is_named_in_the_error",
    "address-taken": "test_catalogue.py::test_taken_address_is_reported",
    "key-missing": "engines/openai/test_attaching.py::test_local_server_gets_the_key_if_configured",
    "key-refused": "engines/openai/test_attaching.py::test_local_server_gets_the_key_if_configured",
    "key-unsafe": "engines/openai/test_attaching.py::test_key_is_not_sent_unencrypted",
    "sign-in-required": "engines/ollama/attached/test_pulls.py::test_failed_pull_has_a_next_step[fault-sign-in",
    "cloud-disabled": "engines/ollama/attached/test_pulls.py::test_failed_pull_has_a_next_step[fault-forbidden",
    "hub-unreachable": "models/test_hub_lists.py::test_hub_that_refuses_connections",
    "hub-access-refused": "models/test_hub_access.py::test_a_gated_repository_says_what_to_do",
    "checksum-mismatch": "models/test_store.py::test_a_wrong_digest_leaves_nothing",
    "service-unsupported": "engines/openai/test_services.py::test_missing_speech_endpoint_is_reported",
    "stream-unsupported": "engines/openvino/driver/test_services.py::test_other_services_do_not_stream",
    "deadline-exceeded": "test_plugin_deadlines.py::test_lifecycle_calls_have_a_timeout",
}
"""An entry's id and a test below tests/; one that ends inside `[` names the cases that begin so, others all cases."""


def due(node: str) -> frozenset[str]:
    """The entries that the test of that node id must provoke."""
    node = node.removeprefix("tests/")
    return frozenset(
        name
        for name, test in PROVOKED.items()
        if node == test or node.startswith(test if "[" in test else f"{test}[")
    )


@contextmanager
def listening() -> Iterator[set[str]]:
    """The ids of the entries whose messages are made in this process until the block ends."""
    said: set[str] = set()
    text = Entry.text

    def told(entry: Entry[Any], **fields: Any) -> str:
        said.add(entry.id)
        return text(entry, **fields)

    with mock.patch.object(Entry, "text", told):
        yield said
