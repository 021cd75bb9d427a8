package main

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
)

// version is set by the Makefile from git describe.
var version = "0.0.0-dev"

func runVersion(_ context.Context, c *call) error {
	if c.json {
		return json.NewEncoder(c.out).Encode(map[string]string{"version": version, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH})
	}
	fmt.Fprintf(c.out, "xostor %s (%s, %s/%s)\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return nil
}
