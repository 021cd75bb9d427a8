package vm

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
)

// Kernel is a kernel of Debian, unpacked or installed.
type Kernel struct {
	Image   string            // The bootable image.
	Release string            // As uname -r says.
	modules map[string]string // Name to file.
}

// ErrNoKernel means that no kernel with modules was found where it was looked for.
var ErrNoKernel = errors.New("no kernel found; run integration/heartbeat/vm/setup.sh")

// OpenKernel finds the kernel under root, which has the layout of a linux-image package: boot/vmlinuz-* and lib/modules.
func OpenKernel(root string) (*Kernel, error) {
	images, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil {
		return nil, fmt.Errorf("find kernel: %w", err)
	}
	slices.Sort(images)
	for _, image := range slices.Backward(images) {
		k := &Kernel{Image: image, Release: strings.TrimPrefix(filepath.Base(image), "vmlinuz-"), modules: map[string]string{}}
		err := filepath.WalkDir(filepath.Join(root, "lib", "modules", k.Release), func(path string, d fs.DirEntry, err error) error {
			if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok && err == nil && d.Type().IsRegular() {
				k.modules[moduleName(name)] = path
			}
			return err
		})
		if err == nil && len(k.modules) > 0 {
			return k, nil
		}
	}
	return nil, fmt.Errorf("%w (looked in %s)", ErrNoKernel, root)
}

// moduleName is how the kernel writes a module's name; files may have dashes.
func moduleName(file string) string { return strings.ReplaceAll(file, "-", "_") }

// Use takes a module from a file instead of the package's own.
func (k *Kernel) Use(file string) {
	k.modules[moduleName(strings.TrimSuffix(filepath.Base(file), ".ko"))] = file
}

// Modules are the files of the named modules and of all that they depend on, in an order in which they can be loaded. A
// package as unpacked has no modules.dep yet, so the modules themselves are asked.
func (k *Kernel) Modules(names ...string) ([]string, error) {
	var files []string
	seen := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		name = moduleName(name)
		if seen[name] {
			return nil
		}
		seen[name] = true
		file, ok := k.modules[name]
		if !ok {
			return fmt.Errorf("kernel %s has no module %s", k.Release, name)
		}
		needs, err := moduleInfo(file, "depends")
		if err != nil {
			return err
		}
		for _, need := range strings.Split(strings.Join(needs, ","), ",") {
			if need != "" {
				if err := add(need); err != nil {
					return err
				}
			}
		}
		files = append(files, file)
		return nil
	}
	for _, name := range names {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// moduleInfo reads the values of a key from a module's .modinfo section (strings key=value, each ended by a zero).
func moduleInfo(file, key string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, fmt.Errorf("open module: %w", err)
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("module %s has no .modinfo", file)
	}
	data, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("read module %s: %w", file, err)
	}
	var values []string
	for entry := range bytes.SplitSeq(data, []byte{0}) {
		if value, ok := bytes.CutPrefix(entry, []byte(key+"=")); ok {
			values = append(values, string(value))
		}
	}
	return values, nil
}
