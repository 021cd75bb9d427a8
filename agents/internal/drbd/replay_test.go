package drbd_test

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/xostor-agents/xostor-agents/agents/internal/drbd"
)

// moment is the state of all resources after the last line with one time stamp, each written as run.log writes it.
type moment struct {
	at    time.Duration // since midnight
	state map[string]string
}

// replay applies a recording and calls each after every group of lines with the same stamp.
func replay(t *testing.T, file string, each func(at time.Duration, st *drbd.State)) (lines int) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st drbd.State
	var ev drbd.Event
	last := time.Duration(-1)
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		text := sc.Text()
		if text == "" || text[0] == '#' {
			continue
		}
		if err := ev.Parse(text); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		stamp, err := time.Parse("2006-01-02T15:04:05.999999-07:00", ev.Time)
		if err != nil {
			t.Fatalf("%s: time stamp of %q: %v", file, text, err)
		}
		at := stamp.Sub(stamp.Truncate(24 * time.Hour))
		if last >= 0 && at != last {
			each(last, &st)
		}
		last = at
		if err := st.Apply(&ev); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		lines++
	}
	if err := sc.Err(); err != nil {
		t.Fatal(err)
	}
	each(last, &st)
	if st.Unknown != 0 {
		t.Errorf("%s: %d lines with unknown objects", file, st.Unknown)
	}
	return lines
}

// summary writes a resource as the lab's run.log does: "Primary disk:UpToDate quorum:no suspended:no fail-io:no || n2 Connecting/Unknown/DUnknown/Off ; ...".
func summary(r *drbd.Resource) string {
	if len(r.Devices) != 1 {
		return ""
	}
	d := r.Devices[0]
	s := fmt.Sprintf("%s disk:%s quorum:%s suspended:%s fail-io:%s ||", r.Role, d.Disk, d.Quorum, r.Suspended, r.ForceIOFailure)
	for i, c := range r.Connections {
		if i > 0 {
			s += " ;"
		}
		s += fmt.Sprintf(" %s %s/%s", c.Name, c.State, c.Role)
		for _, p := range c.PeerDevices {
			s += fmt.Sprintf("/%s/%s", p.Disk, p.Replication)
		}
	}
	return s
}

var (
	stampRE = regexp.MustCompile(`^(\d\d):(\d\d):(\d\d)\.(\d\d\d) `)
	stateRE = regexp.MustCompile(`(?:^|[ :])(n\d) (r\d) ((?:Primary|Secondary|Unknown) disk:\S+ quorum:\S+ suspended:\S+ fail-io:\S+ \|\| .*)$`)
)

// recorded is one status line of a run.log.
type recorded struct {
	at                   time.Duration
	node, resource, text string
}

func statusLines(t *testing.T, file string) (out []recorded) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var at time.Duration
	for line := range strings.Lines(string(b)) {
		line = strings.TrimRight(line, "\n")
		if m := stampRE.FindStringSubmatch(line); m != nil {
			d, err := time.ParseDuration(m[1] + "h" + m[2] + "m" + m[3] + "s" + m[4] + "ms")
			if err != nil {
				t.Fatal(err)
			}
			at = d
		}
		if m := stateRE.FindStringSubmatch(line); m != nil {
			out = append(out, recorded{at, m[1], m[2], strings.TrimSpace(m[3])})
		}
	}
	return out
}

// Every status that the recording driver read on a node must be a state that the replay of that node's events was in at that time.
func TestReplay_LabReachesRecordedStatus(t *testing.T) {
	dir := filepath.Join(traces(t), "lab")
	runs, err := filepath.Glob(filepath.Join(dir, "*", "run.log"))
	if err != nil || len(runs) == 0 {
		t.Fatalf("no runs in %s: %v", dir, err)
	}
	total := 0
	for _, run := range runs {
		t.Run(filepath.Base(filepath.Dir(run)), func(t *testing.T) {
			want := statusLines(t, run)
			history := map[string][]moment{}
			files, _ := filepath.Glob(filepath.Join(filepath.Dir(run), "events2-*.log"))
			for _, file := range files {
				node := strings.Split(filepath.Base(file), "-")[1]
				n := replay(t, file, func(at time.Duration, st *drbd.State) {
					m := moment{at, map[string]string{}}
					for name, r := range st.Resources {
						m.state[name] = summary(r)
					}
					history[node] = append(history[node], m)
				})
				total += n
			}
			checked := 0
			for _, w := range want {
				slack := before
				if w.node == "n1" && filepath.Base(filepath.Dir(run)) == "probe-freeze" {
					slack = 20 * time.Second // its clock stood still for 14 s
				}
				if was(history[w.node], w, slack) {
					checked++
					continue
				}
				t.Errorf("%s %s was recorded at %s as\n  %s\nthe replay was in none such then, but in\n  %s", w.node, w.resource, w.at, w.text, around(history[w.node], w))
			}
			t.Logf("%d recorded states reached", checked)
		})
	}
	t.Logf("%d lines replayed", total)
}

// The driver's stamp is after its ssh round trip; the guests' clocks agree to about 10 ms, except a frozen guest's.
const (
	before = 3 * time.Second
	after  = 200 * time.Millisecond
)

func was(h []moment, w recorded, slack time.Duration) bool {
	for i, m := range h {
		until := time.Duration(1<<62 - 1)
		if i+1 < len(h) && h[i+1].at >= m.at {
			until = h[i+1].at
		}
		if m.at <= w.at+after && until >= w.at-slack && m.state[w.resource] == w.text {
			return true
		}
	}
	return false
}

func around(h []moment, w recorded) string {
	var near []string
	for _, m := range h {
		if m.at <= w.at+after && m.at >= w.at-before || len(near) == 0 {
			near = append(near, m.at.String()+" "+m.state[w.resource])
		}
	}
	return strings.Join(near, "\n  ")
}

// n1's stream up to the first promotion must add up to what `drbdsetup status --json` said at that time.
func TestReplay_ReachesStatusJSON(t *testing.T) {
	dir := traces(t)
	text, err := os.ReadFile(filepath.Join(dir, "status-n1.json"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := drbd.ParseStatus(text)
	if err != nil {
		t.Fatal(err)
	}
	reached := map[string]bool{}
	replay(t, filepath.Join(dir, "events2-n1-boot1.log"), func(_ time.Duration, st *drbd.State) {
		for i := range want {
			r := st.Resources[want[i].Name]
			if r == nil {
				continue
			}
			if cmp.Equal(comparable(*r.Clone()), comparable(want[i])) {
				reached[r.Name] = true
			}
		}
	})
	if len(want) != 2 || !reached["r0"] || !reached["r1"] {
		t.Errorf("reached %v of %d resources in status-n1.json", reached, len(want))
	}
}

// comparable blanks what only one of the two outputs prints.
func comparable(r drbd.Resource) drbd.Resource {
	r.MayPromote, r.Score = drbd.Unknown, 0
	for i := range r.Devices {
		r.Devices[i].Backing = ""
	}
	for i := range r.Connections {
		r.Connections[i].Paths, r.Connections[i].Reached = nil, false
	}
	return r
}

// All recorded streams of the first scenario parse, and end as their phases say.
func TestReplay_FirstScenarioEnds(t *testing.T) {
	dir := traces(t)
	for file, want := range map[string]string{
		"events2-n1-boot1.log": "", // ends with "down": no resource is left
		"events2-n2-boot1.log": "r0 Secondary disk:UpToDate",
		"events2-n3-boot1.log": "r0 Secondary disk:UpToDate",
		"events2-n3-boot2.log": "r0 Secondary disk:UpToDate",
	} {
		t.Run(file, func(t *testing.T) {
			end := ""
			n := replay(t, filepath.Join(dir, file), func(_ time.Duration, st *drbd.State) {
				end = ""
				if r := st.Resources["r0"]; r != nil {
					end = "r0 " + summary(r)
				}
			})
			if want == "" && end != "" || !strings.HasPrefix(end, want) {
				t.Errorf("ends as %q after %d lines, want %q", end, n, want)
			}
		})
	}
}

// Who ended a connection is told right in every recording: only the driver of evict gave `disconnect`; all else was refused by DRBD.
func TestReplay_WhoEndedTheConnection(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(traces(t), "lab", "*", "events2-*.log"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no recordings: %v", err)
	}
	counts := map[string]int{}
	for _, file := range files {
		run, node := filepath.Base(filepath.Dir(file)), strings.Split(filepath.Base(file), "-")[1]
		last := map[string]drbd.ConnState{}
		replay(t, file, func(_ time.Duration, st *drbd.State) {
			for _, r := range st.Resources {
				for _, c := range r.Connections {
					key := r.Name + "/" + c.Name
					if c.State == drbd.StandAlone && last[key] == drbd.Disconnecting {
						counts[run+" "+node+" by hand: "+c.ByHand.String()]++
					}
					last[key] = c.State
				}
			}
		})
	}
	for what, n := range counts {
		// In each of three runs n2 and n3 left n1 on five resources.
		if want := map[string]int{"evict n2 by hand: yes": 15, "evict n3 by hand: yes": 15}[what]; strings.HasSuffix(what, "yes") && n != want || strings.HasSuffix(what, "unknown") {
			t.Errorf("%s: %d times, want %d", what, n, want)
		}
	}
	t.Log(counts)
}
