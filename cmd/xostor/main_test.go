package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRun_CallsThatCannotWork(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "agents.toml")
	if err := os.WriteFile(bad, []byte("[bus]\nsockt = \"x\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		args []string
		want string // part of the one line on stderr
	}{
		{"unknown command", []string{"frobnicate"}, `there is no command "frobnicate"`},
		{"unknown flag", []string{"status", "--colour"}, "xostor help status"},
		{"agent without a name", []string{"agent"}, "agent takes 1 arguments, got 0"},
		{"unknown agent", []string{"agent", "coffee"}, `there is no agent "coffee"`},
		{"bad log level", []string{"status", "--log-level", "loud"}, "--log-level"},
		{"bad time span", []string{"events", "--since", "yesterday"}, "is not a time span"},
		{"configuration that is missing", []string{"status", "--config", "/nonexistent/agents.toml"}, "/nonexistent/agents.toml"},
		{"unknown key", []string{"status", "--config", bad}, "unknown key bus.sockt"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out, errOut strings.Builder
			code := run(t.Context(), tt.args, &out, &errOut)
			text := strings.TrimSuffix(errOut.String(), "\n")
			if code != exitUsage || !strings.Contains(text, tt.want) || strings.Contains(text, "\n") || !strings.HasPrefix(text, "xostor: ") {
				t.Errorf("code %d, %q; want code %d and one line with %q", code, text, exitUsage, tt.want)
			}
		})
	}
}

func TestRun_HelpTeaches(t *testing.T) {
	for _, args := range [][]string{nil, {"help"}, {"--help"}} {
		var out, errOut strings.Builder
		if code := run(t.Context(), args, &out, &errOut); code != exitOK || errOut.Len() > 0 {
			t.Errorf("%v: code %d, stderr %q", args, code, errOut.String())
		}
		for _, c := range commands() {
			if !strings.Contains(out.String(), c.short) {
				t.Errorf("%v does not tell of %s", args, c.name)
			}
		}
	}
	for _, c := range commands() {
		for _, args := range [][]string{{"help", c.name}, {c.name, "--help"}} {
			var out, errOut strings.Builder
			if code := run(t.Context(), args, &out, &errOut); code != exitOK || !strings.Contains(out.String(), "Usage: xostor "+c.name) || !strings.Contains(out.String(), "--config") {
				t.Errorf("%v: code %d, printed %q", args, code, out.String())
			}
		}
	}
}

func TestRun_BusThatIsAway(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agents.toml")
	if err := os.WriteFile(file, []byte("[bus]\nsocket = \"/nonexistent/bus.sock\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errOut strings.Builder
	if code := run(t.Context(), []string{"status", "--config", file}, &out, &errOut); code != exitError || !strings.Contains(errOut.String(), "systemctl start xostor-bus") {
		t.Errorf("code %d, %q; want code 1 and the next step", code, errOut.String())
	}
}

func TestSemver(t *testing.T) {
	for in, want := range map[string]string{"v1.2.3": "1.2.3", "1.2.3-4-gabc": "1.2.3-4-gabc", "abc123-dirty": "0.0.0", "": "0.0.0", "1.2": "0.0.0"} {
		if got := semver(in); got != want {
			t.Errorf("semver(%q) = %q, want %q", in, got, want)
		}
	}
}
