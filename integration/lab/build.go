package lab

import (
	"fmt"
	"os"
	"os/exec"
)

// Build builds programs of this module as `make build` does, static and without symbols, so that what is measured is what is shipped. to is a file for one
// package, an existing folder for several; a package is named by its import path, or by a path relative to the working directory.
func Build(to string, packages ...string) error {
	cmd := exec.Command("go", append([]string{"build", "-trimpath", "-ldflags=-s -w", "-o", to}, packages...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %v: %w\n%s", packages, err, out)
	}
	return nil
}
