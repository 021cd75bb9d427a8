package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// errCannot is wrapped by a scene that cannot be played on this machine; the text says what is missing.
var errCannot = errors.New("cannot be played here")

// scene is one part of the demo. It tells what it does on the timeline and fails when a step does not come true.
type scene struct {
	name string
	play func(context.Context, options, *timeline) error
}

// scenes are played in this order.
func scenes() []scene {
	return []scene{
		{"pool", story},
		{"controller", controllerScene},
		{"heartbeat", heartbeatScene},
	}
}

func sceneNames() string {
	var names []string
	for _, s := range scenes() {
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}

// playScenes plays the scene that was asked for, or all. Of all, one that this machine cannot show is left out with the reason.
func playScenes(ctx context.Context, o options, t *timeline) error {
	for i, s := range scenes() {
		if o.scene != "" && o.scene != s.name {
			continue
		}
		if i > 0 && o.scene == "" {
			t.text(plain, "")
		}
		err := s.play(ctx, o, t)
		if errors.Is(err, errCannot) && o.scene == "" {
			t.text(wrong, fmt.Sprintf("Scene %s is left out: %v", s.name, err))
			continue
		}
		if err != nil {
			return fmt.Errorf("scene %s: %w", s.name, err)
		}
	}
	return nil
}
