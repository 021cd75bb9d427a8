package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/xostor-agents/xostor-agents/agents"
	"github.com/xostor-agents/xostor-agents/bus"
)

func answerOf(t *testing.T, agent, host string, body any) bus.Status {
	t.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	return bus.Status{Agent: agent, Host: host, HostName: "name-" + host, RTT: time.Millisecond, Body: raw}
}

func busOf(t *testing.T, host, cluster string, findings []agents.Finding, hosts ...string) bus.Status {
	t.Helper()
	r := busReport{Status: agents.Status{State: agents.Healthy, Findings: findings}, Bus: busFacts{Cluster: cluster, History: "3 copies"}}
	for _, h := range hosts {
		r.Bus.Hosts = append(r.Bus.Hosts, bus.Host{UUID: h, Name: "name-" + h})
	}
	return answerOf(t, busAgent, host, r)
}

func TestGather(t *testing.T) {
	agent := agents.Status{State: agents.Healthy}
	lost := []agents.Finding{{Code: "bus-alone", Text: "this host hears nothing of the others: no secret"}}
	for _, tt := range []struct {
		name    string
		answers []bus.Status
		want    []string // host/agent, "?" for a host that did not answer
		note    string
	}{
		{"nobody", nil, nil, ""},
		{"a bus that is alone is no row", []bus.Status{busOf(t, "a", "", nil), answerOf(t, "sr-size", "a", agent)}, []string{"a/sr-size"}, ""},
		{"why it is alone is a note", []bus.Status{busOf(t, "a", "", lost), answerOf(t, "sr-size", "a", agent)}, []string{"a/sr-size"}, "no secret"},
		{"all answer", []bus.Status{busOf(t, "b", "p", nil, "a", "b"), busOf(t, "a", "p", nil, "a", "b"), answerOf(t, "sr-size", "b", agent), answerOf(t, "mover", "b", agent)},
			[]string{"a/bus", "b/mover", "b/sr-size", "b/bus"}, ""},
		{"one is missing", []bus.Status{busOf(t, "c", "p", nil, "a", "b", "c"), answerOf(t, "sr-size", "a", agent)}, []string{"a/sr-size", "b/?", "c/bus"}, ""},
	} {
		got, err := gather(tt.answers)
		if err != nil {
			t.Fatal(err)
		}
		var rows []string
		for _, s := range got.agents {
			if s.Missing {
				s.Status.Agent = "?"
			}
			rows = append(rows, s.Host+"/"+s.Status.Agent)
		}
		if strings.Join(rows, " ") != strings.Join(tt.want, " ") || !strings.Contains(got.note, tt.note) || (tt.note == "") != (got.note == "") {
			t.Errorf("%s: %v, note %q; want %v, %q", tt.name, rows, got.note, tt.want, tt.note)
		}
	}
	if _, err := gather([]bus.Status{{Agent: "x", HostName: "h", Body: json.RawMessage(`[`)}}); err == nil || !strings.Contains(err.Error(), "x on h") {
		t.Errorf("an answer that is no JSON: %v", err)
	}
}

func TestPrintStatus_ShowsWhoIsMissingAndWhatToDo(t *testing.T) {
	paused := []agents.Finding{{Code: "history-paused", Subject: "host/a", Text: "events are not kept at present", Fix: "bring back hosts", Severity: agents.Warning}}
	pool, err := gather([]bus.Status{busOf(t, "a", "p", paused, "a", "b")})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	printStatus(&call{out: &out}, pool)
	for _, want := range []string{"1 of 2 hosts connected", "name-b  -      no answer", "history-paused", "next: bring back hosts", "LAG"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in:\n%s", want, out.String())
		}
	}
}
