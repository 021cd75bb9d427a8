#!/bin/sh
# Installs the clients that the conformance tests run, in exact versions, under .tools of the module root (ignored by git).
# Debian's clients are not installed here: apt-get install fence-agents python3-os-xenapi.
set -eu
cd "$(dirname "$0")/../.."
tools=$PWD/.tools
mkdir -p "$tools/npm"

xenapi_js=4.7.6
xenapi_py=26.21.1
linstor_py=1.29.1

if [ "$(cat "$tools/npm/.xen-api" 2>/dev/null || :)" != "$xenapi_js" ]; then
	npm install --prefix "$tools/npm" --no-audit --no-fund --no-update-notifier --ignore-scripts --loglevel=error "xen-api@$xenapi_js" >/dev/null
	echo "$xenapi_js" >"$tools/npm/.xen-api"
fi
if [ "$(cat "$tools/venv/.xenapi" 2>/dev/null || :)" != "$xenapi_py" ]; then
	[ -x "$tools/venv/bin/python" ] || python3 -m venv "$tools/venv"
	"$tools/venv/bin/pip" install --quiet --disable-pip-version-check "XenAPI==$xenapi_py"
	echo "$xenapi_py" >"$tools/venv/.xenapi"
fi
if [ "$(cat "$tools/venv/.linstor" 2>/dev/null || :)" != "$linstor_py" ]; then
	[ -x "$tools/venv/bin/python" ] || python3 -m venv "$tools/venv"
	"$tools/venv/bin/pip" install --quiet --disable-pip-version-check "python-linstor==$linstor_py"
	echo "$linstor_py" >"$tools/venv/.linstor"
fi
for program in fence_xenapi /usr/bin/python3; do
	command -v "$program" >/dev/null || echo "missing: $program (apt-get install fence-agents python3-os-xenapi)" >&2
done
