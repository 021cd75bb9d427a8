#!/bin/sh
# Unpacks Debian's kernel for the emulated machines under .tools/vm of the module root (ignored by git). Nothing is installed:
# an installed kernel would want a boot loader and an initramfs of its own. The cloud flavour has nbd, drbd and virtio in a
# third of the size.
set -eu
cd "$(dirname "$0")/../../.."
tools=$PWD/.tools/vm
package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)/\1/p' | head -n 1)
[ -n "$package" ] || { echo "apt knows no linux-image-cloud-amd64: run apt-get update" >&2; exit 1; }
[ "$(cat "$tools/.package" 2>/dev/null || :)" = "$package" ] && exit 0
rm -rf "$tools"
mkdir -p "$tools/deb"
(cd "$tools/deb" && apt-get download -qq -o APT::Sandbox::User=root "$package")
dpkg-deb -x "$tools"/deb/*.deb "$tools"
rm -r "$tools/deb" "$tools/usr"
echo "$package" >"$tools/.package"
