package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
)

// stage is what a pool of real hosts belongs to: the pool ends when the scene does, however that ends. It is an sdns.TB.
type stage struct {
	ctx      context.Context
	mu       sync.Mutex
	cleanups []func()
	log      []string
	err      error
}

// onStage plays f and cleans up behind it. A step of f that fails, or is interrupted, ends it.
func onStage(ctx context.Context, f func(*stage) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &stage{ctx: ctx}
	s.aside(func() {
		if err := f(s); err != nil {
			s.fail(err.Error())
		}
	})
	cancel()
	for i := len(s.cleanups) - 1; i >= 0; i-- {
		s.aside(s.cleanups[i])
	}
	if s.err != nil && len(s.log) > 0 {
		return fmt.Errorf("%w\n%s", s.err, strings.Join(s.log, "\n"))
	}
	return s.err
}

// aside calls f on a goroutine of its own, which Fatal may end, and waits for its end.
func (s *stage) aside(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if v := recover(); v != nil {
				s.fail(fmt.Sprint("panic: ", v))
			}
		}()
		f()
	}()
	<-done
}

// fail keeps the first failure.
func (s *stage) fail(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = errors.New(text)
	}
}

func (s *stage) Helper()                  {}
func (s *stage) Context() context.Context { return s.ctx }

func (s *stage) Cleanup(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cleanups = append(s.cleanups, f)
}

// Log keeps what is shown only when the scene fails.
func (s *stage) Log(args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, strings.TrimSpace(fmt.Sprintln(args...)))
}

func (s *stage) Logf(format string, args ...any) { s.Log(fmt.Sprintf(format, args...)) }

func (s *stage) Fatal(args ...any) {
	s.fail(strings.TrimSpace(fmt.Sprintln(args...)))
	runtime.Goexit()
}

func (s *stage) Fatalf(format string, args ...any) { s.Fatal(fmt.Sprintf(format, args...)) }
func (s *stage) Skip(args ...any)                  { s.Fatal(args...) }
