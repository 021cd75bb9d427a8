package main

import (
	"context"
	"sync"
)

// tasks run beside a daemon's work. The zero value is ready.
type tasks struct {
	wg     sync.WaitGroup
	cancel []context.CancelFunc
}

func (t *tasks) run(ctx context.Context, f func(context.Context)) {
	ctx, cancel := context.WithCancel(ctx)
	t.cancel = append(t.cancel, cancel)
	t.wg.Go(func() { f(ctx) })
}

// end ends all and waits for them.
func (t *tasks) end() {
	for _, cancel := range t.cancel {
		cancel()
	}
	t.wg.Wait()
}
