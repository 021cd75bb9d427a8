"""Drives upstream's Python binding, XenAPI, over TCP or a unix socket.

Arguments: URL (for a unix socket its path with underscores for slashes and a slash after it), ref of a halted VM, ref of an
SR, file with the types of all fields by class. Prints one JSON object."""

import json
import sys

import XenAPI

url, vm, sr, types = sys.argv[1:5]
session = XenAPI.Session(url, transport=XenAPI.UDSTransport() if url.endswith("/") else None)
session.login_with_password("root", "secret", "2.21", "conformance")
api = session.xenapi
out = {"version": session.API_version}
out["host"] = api.host.get_name_label(api.session.get_this_host(session._session))

out["wrong"], out["checked"] = [], 0
with open(types) as f:
    types = json.load(f)


def check(source, cls, record):
    """Every field in the order of the wire, each of its type; nothing else."""
    got = [[name, type(value).__name__] for name, value in record.items()]
    out["checked"] += len(got)
    if got != types[cls]:
        out["wrong"].append([source, cls, [p for p in zip(got, types[cls]) if p[0] != p[1]][:3]])


for cls in types:
    for ref, record in getattr(api, cls).get_all_records().items():
        check("get_all_records", cls, record)
wire_name = {cls.lower(): cls for cls in types}
for event in api.event_from(["*"], "", 0.0)["events"]:
    check("event.from", wire_name[event["class"]], event["snapshot"])

record = api.VM.get_record(vm)
out["types"] = {
    k: type(record[k]).__name__
    for k in ("name_label", "memory_static_max", "is_a_template", "HVM_shadow_multiplier", "snapshot_time", "other_config", "VBDs", "name_description")
}
out["multiplier"] = record["HVM_shadow_multiplier"]

first = api.event_from(["vm", "SR"], "", 0.0)
out["events"] = sorted({(e["class"], e["operation"]) for e in first["events"]})
out["counts"] = [type(v).__name__ for v in first["valid_ref_counts"].values()][0]
api.VM.set_name_description(vm, "é <seen>")
second = api.event_from(["vm", "SR"], first["token"], 30.0)
out["seen"] = [(e["class"], e["operation"], e["snapshot"]["name_description"]) for e in second["events"]]
out["idle"] = api.event_from(["vm"], second["token"], 0.0)["events"]

api.VM.add_to_other_config(vm, "k", "v")
try:
    api.VM.add_to_other_config(vm, "k", "v")
except XenAPI.Failure as e:
    out["duplicate"] = e.details[0]
try:
    api.SR.set_physical_size(sr, "1")
except XenAPI.Failure as e:
    out["refused"] = e.details[0]
api.session.add_to_other_config(session._session, "_sm_session", sr)
api.SR.set_physical_size(sr, str(3 << 40))
out["size"] = api.SR.get_physical_size(sr)

task = getattr(api, "Async").VM.start(vm, False, False)
token, status = "", "pending"
while status == "pending":
    reply = api.event_from(["task/" + task], token, 30.0)
    token = reply["token"]
    for e in reply["events"]:
        status = e["snapshot"]["status"]
out["task"] = status
out["found"] = len(api.VM.get_all_records_where('field "power_state" = "Running" and field "is_control_domain" = "false"'))
session.logout()
try:
    session.xenapi.VM.get_all()
except Exception as e:  # Either the binding or XAPI refuses: both are an answer.
    out["after"] = type(e).__name__
print(json.dumps(out))
