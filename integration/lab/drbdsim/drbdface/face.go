// Package drbdface is the program side of the stand-in of drbdsetup and drbdadm: it asks the model that a drbdsim.Server has. It imports so little because
// its start is part of what benchmarks measure, and drbd-utils' programs start in a millisecond.
package drbdface

import (
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Environment variables of the programs.
const (
	EnvSocket = "DRBDSIM_SOCKET" // of the server
	EnvNode   = "DRBDSIM_NODE"   // the host on which the program runs
)

// Call is what a program sends: one line of fields that are separated by NUL. Answered is its output, as it is to be printed, then NUL, the exit code and a
// newline.
type Call struct {
	Node, Program string
	Args          []string
}

// Line is the call as it is sent. Arguments have no newline.
func (c Call) Line() string {
	return strings.Join(append([]string{c.Node, c.Program}, c.Args...), "\x00") + "\n"
}

// ParseCall undoes Line; not ok: it is none.
func ParseCall(line string) (c Call, ok bool) {
	f := strings.Split(strings.TrimSuffix(line, "\n"), "\x00")
	if len(f) < 2 {
		return Call{}, false
	}
	return Call{Node: f[0], Program: f[1], Args: f[2:]}, true
}

// Main is the whole drbdsetup or drbdadm: it asks the server that the environment names, and returns the exit code.
func Main(program string, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c, err := dial(os.Getenv(EnvSocket))
	if err == nil {
		_, err = io.WriteString(c, Call{os.Getenv(EnvNode), program, args}.Line())
	}
	if err != nil {
		_, _ = io.WriteString(stderr, "Could not connect to 'drbd' generic netlink family\n")
		return 20
	}
	if slices.Contains(args, "--poll") {
		go func() { // the stream lives as long as stdin is open
			_, _ = io.Copy(io.Discard, stdin)
			_ = syscall.Shutdown(int(c.Fd()), syscall.SHUT_RDWR) // ends the reading below
		}()
	}
	return answer(c, stdout, stderr)
}

// answer prints what comes until the exit code does.
func answer(c io.Reader, stdout, stderr io.Writer) int {
	text, buf := "", make([]byte, 64<<10)
	for {
		n, err := c.Read(buf)
		text += string(buf[:n])
		for line := range strings.Lines(text) {
			if !strings.HasSuffix(line, "\n") {
				break
			}
			text = text[len(line):]
			if code, ok := strings.CutPrefix(line, "\x00"); ok {
				exit, _ := strconv.Atoi(strings.TrimSpace(code))
				return exit
			}
			to := stdout
			if strings.Contains(line, ": (") {
				to = stderr
			}
			if _, err := io.WriteString(to, line); err != nil {
				return 0
			}
		}
		if err != nil {
			return 20 // the server is gone, as a module that was removed
		}
	}
}

// dial is net.Dial("unix", path) without package net.
func dial(path string) (*os.File, error) {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := syscall.Connect(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		_ = syscall.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}
