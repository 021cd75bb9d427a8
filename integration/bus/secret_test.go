package bus_test

import (
	"os"
	"strings"
	"testing"
)

// TestSecretMissingThenThereThenRotated: agents of the host keep their connection to the door all the time.
func TestSecretMissingThenThereThenRotated(t *testing.T) {
	t.Parallel()
	s := newSite(t, 3)
	if err := os.Remove(s.secret); err != nil {
		t.Fatal(err)
	}
	for _, n := range s.nodes {
		s.start(n)
	}
	a, b := s.watch(s.nodes[0]), s.watch(s.nodes[1])
	s.set("alone")
	s.sees(a, "alone") // The coordinator's own door works.
	if b.Freshness().Fresh {
		t.Error("a host without a secret heard the others")
	}
	s.eventually("the finding is in the status", func() bool {
		out, _, _ := s.tool(s.nodes[1], "status")
		return strings.Contains(out, "note: this host hears nothing of the others") && strings.Contains(out, s.secret)
	})
	s.write(s.secret, poolSecret)
	s.meshed(s.nodes...)
	s.set("with a secret")
	s.sees(a, "with a secret")
	s.sees(b, "with a secret")
	s.eventually("the note is gone", func() bool {
		out, _, _ := s.tool(s.nodes[1], "status")
		return !strings.Contains(out, "note:") && strings.Contains(out, "3 of 3 hosts connected")
	})

	s.write(s.secret, strings.ToUpper(poolSecret))
	if err := s.nodes[2].daemon.Kill(); err != nil { // It starts again and knows only the new secret.
		t.Fatal(err)
	}
	third := s.watch(s.nodes[2])
	s.set("after the rotation")
	s.sees(a, "after the rotation")
	s.sees(b, "after the rotation")
	s.sees(third, "after the rotation")
	s.neverRestarted(s.nodes[2])
	for _, n := range s.nodes {
		for _, secret := range []string{poolSecret, strings.ToUpper(poolSecret)} {
			if strings.Contains(n.daemon.Output(), secret) {
				t.Errorf("the log of %s has the pool secret", n.Name)
			}
		}
	}
}
