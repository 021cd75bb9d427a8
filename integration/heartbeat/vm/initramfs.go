package vm

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path"
	"regexp"
	"strings"
)

// initramfs is an archive of the kind that the kernel unpacks as its first root ("newc", Documentation/driver-api/
// early-userspace/buffer-format.rst). It is not compressed: unpacking it costs an emulated processor more than copying.
type initramfs struct {
	b     bytes.Buffer
	inode int
	dirs  map[string]bool
}

func newInitramfs() *initramfs { return &initramfs{dirs: map[string]bool{"/": true, ".": true}} }

func (a *initramfs) entry(name string, mode uint32, data []byte) {
	a.inode++
	name = strings.TrimPrefix(name, "/")
	links := 1
	fmt.Fprintf(&a.b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", a.inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	a.b.WriteString(name)
	a.b.WriteByte(0)
	a.pad()
	a.b.Write(data)
	a.pad()
}

func (a *initramfs) pad() {
	for a.b.Len()%4 != 0 {
		a.b.WriteByte(0)
	}
}

// dir adds a folder and those above it.
func (a *initramfs) dir(name string) {
	name = path.Clean(name)
	if a.dirs[name] {
		return
	}
	a.dir(path.Dir(name))
	a.dirs[name] = true
	a.entry(name, 0o040755, nil)
}

// file adds a file and the folders above it.
func (a *initramfs) file(name string, mode uint32, data []byte) {
	a.dir(path.Dir(name))
	a.entry(name, 0o100000|mode, data)
}

// copy adds a file of this machine.
func (a *initramfs) copy(name, from string) error {
	info, err := os.Stat(from)
	if err != nil {
		return fmt.Errorf("add %s: %w", name, err)
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("add %s: %w", name, err)
	}
	a.file(name, uint32(info.Mode().Perm()), data)
	return nil
}

var lddPath = regexp.MustCompile(`(/\S+) \(0x`)

// program adds a program of this machine and the libraries that it is linked with.
func (a *initramfs) program(name, from string, have map[string]bool) error {
	if err := a.copy(name, from); err != nil {
		return err
	}
	f, err := elf.Open(from)
	if err != nil {
		return nil // A script needs no libraries.
	}
	defer f.Close()
	if libs, err := f.ImportedLibraries(); err != nil || len(libs) == 0 {
		return nil // Static.
	}
	out, err := exec.Command("ldd", from).Output()
	if err != nil {
		return fmt.Errorf("find libraries of %s: %w", from, err)
	}
	for _, m := range lddPath.FindAllStringSubmatch(string(out), -1) {
		if have[m[1]] {
			continue
		}
		have[m[1]] = true
		if err := a.copy(m[1], m[1]); err != nil {
			return err
		}
	}
	return nil
}

// bytes ends the archive.
func (a *initramfs) bytes() []byte {
	a.inode = -1
	a.entry("TRAILER!!!", 0, nil)
	return a.b.Bytes()
}
