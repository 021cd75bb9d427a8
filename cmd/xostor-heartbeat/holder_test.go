package main

import (
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/xostor-agents/xostor-agents/agents/heartbeat"
)

// script is a look through the processes that finds what it is told to, or hangs.
type script struct {
	mu    sync.Mutex
	found error
	hang  chan struct{}
}

func (s *script) set(found error, hang chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.found, s.hang = found, hang
}

func (s *script) look() error {
	s.mu.Lock()
	found, hang := s.found, s.hang
	s.mu.Unlock()
	if hang != nil {
		<-hang
	}
	return found
}

// A takeover sees who has come or gone just now, and waits but a moment for a look that hangs.
func TestWatched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held := &heartbeat.HolderError{PID: 7, Command: "http-disk-server", Disk: "/dev/drbd1"}
		s := &script{}
		w := watch(t.Context(), s.look, slog.New(slog.DiscardHandler))
		for _, want := range []error{nil, held, nil} {
			s.set(want, nil)
			if err := w.fresh(freshLook); !errors.Is(err, want) {
				t.Errorf("got %v, want %v", err, want)
			}
		}
		wait := make(chan struct{})
		s.set(held, wait)
		time.Sleep(10 * lookEvery)
		begun := time.Now()
		if err := w.fresh(freshLook); err != nil || time.Since(begun) != freshLook {
			t.Errorf("the look hangs: %v after %v, want what was known, after %v", err, time.Since(begun), freshLook)
		}
		s.set(held, nil)
		close(wait)
		synctest.Wait()
		if err := w.fresh(freshLook); !errors.Is(err, held) {
			t.Errorf("it hangs no more: %v, want %v", err, held)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		s := &script{hang: make(chan struct{})}
		begun := time.Now()
		w := watch(t.Context(), s.look, slog.New(slog.DiscardHandler))
		if err := w.fresh(freshLook); err == nil || time.Since(begun) != firstLook+freshLook {
			t.Errorf("opened before any look was done: %v after %v", err, time.Since(begun))
		}
		close(s.hang)
		synctest.Wait()
		s.set(nil, nil)
		if err := w.fresh(freshLook); err != nil {
			t.Errorf("after the first look: %v", err)
		}
	})
}
