package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"

	"github.com/xostor-agents/xostor-agents/bus/subject"
)

const (
	servicePrefix = "xostor-"
	statusSubject = subject.Prefix + ".ask.status"
	statusWait    = time.Second
)

// ServiceInfo is who answers.
type ServiceInfo struct {
	// Agent is the agent's name, for example "sr-size". Letters, digits and dashes.
	Agent string
	// Host is the host's uuid and HostName its name.
	Host, HostName string
	// Version is a semantic version, as NATS micro services require.
	Version string
	// Description is one line for people.
	Description string
}

// Service is an agent that answers on the bus.
type Service struct{ micro micro.Service }

// Serve makes an agent answer $SRV.PING, $SRV.INFO and $SRV.STATS as service "xostor-<agent>", and requests for its status
// with the JSON of what status returns. Status is called from another goroutine, one call at a time.
func Serve(c *Conn, info ServiceInfo, status func() any) (*Service, error) {
	s, err := micro.AddService(c.nc, micro.Config{
		Name: servicePrefix + info.Agent, Version: info.Version, Description: info.Description,
		Metadata: map[string]string{"agent": info.Agent, "host": info.Host, "hostname": info.HostName},
	})
	if err != nil {
		return nil, fmt.Errorf("serve agent %s: %w", info.Agent, err)
	}
	answer := micro.HandlerFunc(func(r micro.Request) {
		body, err := json.Marshal(status())
		if err != nil {
			_ = r.Error("500", "status is not JSON: "+err.Error(), nil) // The asker's deadline covers a lost answer.
			return
		}
		_ = r.RespondJSON(Status{Agent: info.Agent, Host: info.Host, HostName: info.HostName, Version: info.Version, Body: body})
	})
	// Without a queue group: everybody who runs is to answer, not one of them.
	err = s.AddEndpoint("status", answer, micro.WithEndpointSubject(statusSubject), micro.WithEndpointQueueGroupDisabled())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("serve status of agent %s: %w", info.Agent, err), s.Stop())
	}
	return &Service{micro: s}, nil
}

// Stop ends the service.
func (s *Service) Stop() error {
	if err := s.micro.Stop(); err != nil {
		return fmt.Errorf("stop service: %w", err)
	}
	return nil
}

// Status is one agent's answer. RTT is the time until it arrived.
type Status struct {
	Agent    string          `json:"agent"`
	Host     string          `json:"host"`
	HostName string          `json:"hostname"`
	Version  string          `json:"version"`
	RTT      time.Duration   `json:"rtt_ns,omitempty"`
	Body     json.RawMessage `json:"status"`
}

// Statuses asks all agents of all hosts and gathers answers until ctx ends, at most one second when it has no deadline, or
// enough says that no more are expected (nil: never). Agents that do not answer are not in the result: the caller knows which
// hosts there should be.
func Statuses(ctx context.Context, c *Conn, enough func([]Status) bool) ([]Status, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, statusWait)
		defer cancel()
	}
	inbox := c.nc.NewRespInbox()
	sub, err := c.nc.SubscribeSync(inbox)
	if err != nil {
		return nil, fmt.Errorf("ask for status: %w", err)
	}
	defer func() { _ = sub.Unsubscribe() }() // Fails only on a closed connection.
	asked := time.Now()
	if err := c.nc.PublishRequest(statusSubject, inbox, nil); err != nil {
		return nil, fmt.Errorf("ask for status: %w", err)
	}
	var all []Status
	for {
		m, err := sub.NextMsgWithContext(ctx)
		switch {
		case errors.Is(err, nats.ErrNoResponders):
			return all, nil
		case errors.Is(err, context.DeadlineExceeded):
			return all, nil
		case err != nil:
			return all, fmt.Errorf("ask for status: %w", err)
		}
		var s Status
		if json.Unmarshal(m.Data, &s) != nil || s.Agent == "" {
			continue // An answer that says only that there is none.
		}
		s.RTT = time.Since(asked)
		all = append(all, s)
		if enough != nil && enough(all) {
			return all, nil
		}
	}
}
