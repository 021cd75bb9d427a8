"""Drives a LINSTOR controller with LINBIT's own Python library as XOSTOR's storage driver does, and prints what it saw as JSON."""
import json
import sys

import linstor

uri = sys.argv[1]
seen = {}


def done(replies, name):
    """Fails on any reply that the library itself does not take for a success, an info or a warning."""
    if not linstor.Linstor.all_api_responses_no_error(replies):
        raise SystemExit("%s: %s" % (name, [str(r) for r in replies]))
    return replies


lin = linstor.MultiLinstor([uri])
lin.connect()
seen["version"] = lin.controller_version().version
seen["nodes"] = [[n.name, n.type, n.connection_status, n.net_interfaces[0].address] for n in lin.node_list_raise().nodes]

done(lin.resource_group_create("xcp-sr-py", place_count=2, storage_pool=["thin"], diskless_on_remaining=False), "group create")
done(lin.volume_group_create("xcp-sr-py"), "volume group create")
seen["groups"] = sorted(g.name for g in lin.resource_group_list_raise().resource_groups)

done(lin.resource_group_spawn("xcp-sr-py", "xcp-volume-py", ["1073741824B"], definitions_only=True), "spawn")
done(lin.resource_dfn_modify("xcp-volume-py", {}, peer_slots=3), "peer slots")
done(lin.resource_auto_place("xcp-volume-py", place_count=2, storage_pool=["thin"], diskless_on_remaining=False), "auto place")

definition = lin.resource_dfn_list_raise(query_volume_definitions=True, filter_by_resource_definitions=["xcp-volume-py"]).resource_definitions[0]
seen["definition"] = [definition.name, definition.resource_group_name, definition.drbd_data.peer_slots, definition.volume_definitions[0].size]


def places():
    """Returns node, flags, disk state and in_use of each place, as `linstor volume list` reads them."""
    out = []
    listed = lin.volume_list_raise(filter_by_resources=["xcp-volume-py"])
    for r in sorted(listed.resources, key=lambda r: r.node_name):
        volume = r.volumes[0]
        state = volume.state.disk_state if volume.state else None
        in_use = [s.in_use for s in listed.resource_states if s.node_name == r.node_name]
        out.append([r.node_name, r.flags, state, in_use, volume.storage_pool_name, volume.allocated_size > 0])
    return out


seen["placed"] = places()
witness = [p[0] for p in seen["placed"] if "TIE_BREAKER" in p[1]][0]
done(lin.resource_toggle_disk(witness, "xcp-volume-py", storage_pool="thin"), "toggle to diskful")
seen["three"] = places()
done(lin.resource_toggle_disk(witness, "xcp-volume-py", diskless=True), "toggle to diskless")
done(lin.resource_make_available(witness, "xcp-volume-py", diskful=False), "make available")
seen["resources"] = sorted(r.node_name for r in lin.resource_list_raise(filter_by_resources=["xcp-volume-py"]).resources)
done(lin.volume_dfn_modify("xcp-volume-py", 0, size=2 * 1024 * 1024), "resize")

pools = lin.storage_pool_list_raise(filter_by_stor_pools=["thin"]).storage_pools
seen["pools"] = [[p.node_name, p.provider_kind, p.free_space.free_capacity, p.free_space.total_capacity] for p in pools]
seen["max volume"] = lin.resource_group_qmvs("xcp-sr-py")[0].candidates[0].max_volume_size > 0
seen["size info"] = lin.resource_group_query_size_info("xcp-sr-py").space_info is not None

kv = linstor.KV("xcp-sr-py", uri=uri, namespace="/xcp/volume/")
kv["0001/not-exists"] = "0"
kv["0001/volume-name"] = "xcp-volume-py"
again = linstor.KV("xcp-sr-py", uri=uri, namespace="/xcp/volume/0001/")
seen["kv"] = sorted(again.items())
again.clear()
seen["kv cleared"] = sorted(linstor.KV("xcp-sr-py", uri=uri).items())

done(lin.snapshot_create([], "xcp-volume-py", "snap1", False), "snapshot")
seen["snapshots"] = [[s.name, sorted(s.nodes)] for s in lin.snapshot_dfn_list_raise().snapshots]
done(lin.snapshot_delete("xcp-volume-py", "snap1"), "snapshot delete")

done(lin.node_modify("hostA", property_dict={"Aux/conformance": "yes"}), "node modify")
done(lin.netinterface_create("hostA", "storage", "10.9.0.1"), "interface create")
done(lin.node_modify("hostA", property_dict={"PrefNic": "storage"}), "prefer it")
done(lin.node_modify("hostA", property_dict={}, delete_props=["PrefNic"]), "prefer nothing")
done(lin.netinterface_delete("hostA", "storage"), "interface delete")
done(lin.controller_set_prop("Aux/conformance", "yes"), "controller property")
done(lin.controller_del_prop("Aux/conformance"), "controller property")

missing = lin.resource_delete("hostA", "nothing-here")
seen["delete missing"] = [r.is_error() for r in missing]
done(lin.resource_delete(witness, "xcp-volume-py"), "resource delete")
done(lin.resource_dfn_delete("xcp-volume-py"), "definition delete")
done(lin.resource_group_delete("xcp-sr-py"), "group delete")
seen["left"] = [r.name for r in lin.resource_dfn_list_raise().resource_definitions]
lin.disconnect()
print(json.dumps(seen))
