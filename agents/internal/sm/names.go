// Package sm knows the facts of XCP-ng's LinstorSR driver that an agent needs to share an SR with it: names, the
// layout of its key-value store, and its size formulas. Everything is a pure function of its arguments.
//
// Sources: xcp-ng/sm, branch 3.2.12-8.3 (drivers/linstorvolumemanager.py "LVMgr", drivers/LinstorSR.py "LSR",
// drivers/linstorjournaler.py "LJ") and the 8.3 update sm-3.2.12-21.1 ("R21"). See DESIGN.md.
package sm

import "strings"

// SRType is the type of an XOSTOR SR in XAPI.
const SRType = "linstor"

// Names that the driver gives to LINSTOR objects (LVMgr:33-39, 345-350; LSR:85-86).
const (
	GroupPrefix      = "xcp-sr-"
	HAGroupPrefix    = "xcp-ha-"
	VolumePrefix     = "xcp-volume-"
	PersistentPrefix = "xcp-persistent-"

	DatabaseVolume  = PersistentPrefix + "database"
	StatefileVolume = PersistentPrefix + "ha-statefile"
	RedoLogVolume   = PersistentPrefix + "redo-log"
)

// GroupName maps the group-name of a PBD's device-config to the one name that is storage pool, resource group and
// key-value instance at once: "linstor_group/thin_device" is "xcp-sr-linstor_group_thin_device". The mapping is not
// injective: "a/b_c" and "a_b/c" collide (LVMgr:2986-2997).
func GroupName(groupName string) string { return GroupPrefix + baseGroup(groupName) }

// HAGroupName is the resource group of the HA volumes; their storage pool is still GroupName's.
func HAGroupName(groupName string) string { return HAGroupPrefix + baseGroup(groupName) }

func baseGroup(groupName string) string { return strings.ReplaceAll(groupName, "/", "_") }

// IsPersistent says whether a resource is one of the volumes that agents must leave where they are: LINSTOR's
// database, the HA statefile, the redo log.
func IsPersistent(resource string) bool { return strings.HasPrefix(resource, PersistentPrefix) }

// IsVolume says whether a resource name is one that the driver gives to data volumes.
func IsVolume(resource string) bool { return strings.HasPrefix(resource, VolumePrefix) }

// DevicePath is the path that the driver gives to tapdisk and vhd-util; there is one volume per resource (LVMgr:44,
// 1996-2004).
func DevicePath(resource string) string { return "/dev/drbd/by-res/" + resource + "/0" }
