package linstorface

import (
	"bytes"
	"fmt"
	"net/http"

	"github.com/xostor-agents/xostor-agents/integration/lab/linstorsim"
)

// events serves one of LINSTOR's two streams: no ids, no retry, no heartbeats, no replay. On the promotion stream
// `Last-Event-ID: current` makes LINSTOR tell every subscriber the present value of every resource.
func (f *Face) events(stream string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		cut := f.cutChannel()
		seq := f.sim.EventSeq()
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(http.StatusOK)
		flush := http.NewResponseController(w).Flush
		if flush() != nil {
			return
		}
		if stream == "promotion" && r.Header.Get("Last-Event-ID") == "current" {
			f.sim.BroadcastPromotion()
		}
		for sent := 0; ; {
			events, next, changed := f.sim.Events(seq)
			seq = next
			for _, e := range events {
				if e.Stream != stream {
					continue
				}
				if !f.sendEvent(w, e) {
					return
				}
				sent++
				if x := f.fault(SSECut, r.URL.Path); x != nil && sent >= x.Times {
					_ = flush()
					return
				}
			}
			if flush() != nil || f.sim.Controller().Phase != linstorsim.Up {
				return
			}
			select {
			case <-changed:
			case <-cut:
				return
			case <-r.Context().Done():
				return
			}
		}
	}
}

func (f *Face) sendEvent(w http.ResponseWriter, e linstorsim.Event) bool {
	data, err := marshal(e.Data)
	if err != nil {
		panic(fmt.Sprintf("linstorface: encode event: %v", err))
	}
	var buf bytes.Buffer
	times := 1
	if f.faultSet(SSEDuplicate) {
		times = 2
	}
	for range times {
		fmt.Fprintf(&buf, "event: %s\ndata: %s\n\n", e.Name, data)
	}
	_, err = w.Write(buf.Bytes())
	return err == nil
}
