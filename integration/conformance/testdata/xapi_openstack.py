"""Drives Debian's python3-os-xenapi: a pool of five sessions, plugin calls, typed objects.

Arguments: URL. Prints one JSON object."""

import json
import sys

from os_xenapi.client import session as client


class Session(client.XenAPISession):
    # The library resolves the URL's host together with its port, which only works on port 80.
    def _get_ip_from_url(self, url):
        return "127.0.0.1"

    # The library unpickles a str here, which Python 3 refuses whatever the answer is.
    def _verify_plugin_version(self):
        pass


s = Session(sys.argv[1], "root", "secret", originator="os-conformance")
out = {"product": [list(s.product_version), s.product_brand], "platform": list(s.platform_version), "host": s.host_uuid}
out["plugin"] = s.call_plugin("echo", "main", {"text": "é & <hello>"})
sr = s.call_xenapi("SR.get_all")[0]
out["sr"] = s.SR.get_record(sr)["type"]
out["vms"] = len(list(s.VM.get_all_records_where('field "is_control_domain"="false"')))
out["networks"] = len(s.network.get_all())
out["pbds"] = len([r for _, r in s.get_all_refs_and_recs("PBD")])
vdi = s.call_xenapi("VDI.create", {
    "name_label": "os disk", "name_description": "", "SR": sr, "virtual_size": str(1 << 30), "type": "user", "sharable": False, "read_only": False,
    "xenstore_data": {}, "other_config": {}, "sm_config": {}, "tags": [],
})
out["size"] = s.VDI.get_virtual_size(vdi)
s.call_xenapi("VDI.destroy", vdi)
try:
    s.VDI.get_record(vdi)
except client.XenAPI.Failure as e:
    out["gone"] = e.details
print(json.dumps(out))
