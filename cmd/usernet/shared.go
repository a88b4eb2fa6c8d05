package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"usernet/api"
	"usernet/api/client"
	"usernet/network"
)

// Every entry of the shared mode begins here: it sees that keeper and daemon live, and starts what does not. A lock keeps
// two that find nothing from starting twice.

// A sharedClient is an entry's way to the daemon.
type sharedClient struct {
	dir    *network.Dir
	client *client.Client
	daemon int // its PID
}

// openSharedClient returns when the daemon answers.
func openSharedClient(ctx context.Context) (*sharedClient, error) {
	path, err := network.DefaultDir()
	if err != nil {
		return nil, err
	}
	dir, err := network.OpenDir(path)
	if err != nil {
		return nil, err
	}
	s := &sharedClient{dir: dir, client: client.New(filepath.Join(path, network.DaemonSocket))}
	if err := s.ensure(ctx); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *sharedClient) close() error {
	s.client.Close()
	return s.dir.Close()
}

// askQuickly is how long a daemon has to say that it lives. One that is just being started says so only when it serves all that was
// recorded.
const askQuickly = 10 * time.Second

// alive asks the daemon whether it is there. It stays for a while then.
func (s *sharedClient) alive(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, askQuickly)
	defer cancel()
	info, err := s.client.Info(ctx)
	s.daemon = info.PID
	return err == nil
}

// keeper returns nil where none lives. It is held by its pidfd.
func (s *sharedClient) keeper() *os.File {
	var k keeperRecord
	if s.dir.ReadFile(network.KeeperFile, &k) != nil {
		return nil // there was none, or what it wrote is of no use: a new one writes anew
	}
	f, err := k.Process.Open()
	if err != nil {
		return nil
	}
	return f
}

func (s *sharedClient) ensure(ctx context.Context) error {
	if k := s.keeper(); k != nil {
		defer k.Close()
		if s.alive(ctx) {
			return nil
		}
	}
	lock, err := s.dir.Lock(ctx, "start of the shared networks")
	if err != nil {
		return err
	}
	return errors.Join(s.start(ctx), lock.Unlock())
}

// start starts what is missing. The lock is held.
func (s *sharedClient) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, daemonPatience)
	defer cancel()
	for {
		alive, k := s.alive(ctx), s.keeper()
		switch {
		case k == nil && alive:
			daemon, err := network.ReadProcess(s.daemon)
			if err != nil {
				continue // it has just ended
			}
			return startKeeper(s.dir, daemon)
		case k == nil:
			if err := startKeeper(s.dir, network.Process{}); err != nil {
				return err
			}
			if s.alive(ctx) {
				return nil
			}
		case alive:
			k.Close()
			return nil
		default:
			err := s.await(ctx, k)
			k.Close()
			if err != nil {
				return err
			}
		}
		if ctx.Err() != nil {
			return fmt.Errorf("the daemon of the shared networks does not answer: see %s", filepath.Join(s.dir.Path(), logName))
		}
	}
}

// await waits for the keeper to start the daemon again, which it does at once unless that dies each time.
func (s *sharedClient) await(ctx context.Context, keeper *os.File) error {
	if boot, err := network.BootID(); err == nil {
		if _, err := s.dir.Load(boot); err != nil && !errors.Is(err, network.ErrOtherBoot) {
			return err // what keeps the daemon from starting
		}
	}
	t := time.NewTimer(20 * time.Millisecond)
	defer t.Stop()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		untilReadable(keeper)
	}()
	select {
	case <-t.C:
	case <-ended:
	case <-ctx.Done():
	}
	_ = keeper.SetReadDeadline(time.Unix(1, 0))
	<-ended
	return nil
}

// do asks something of the daemon; when that has ended just before, of a new one.
func (s *sharedClient) do(ctx context.Context, ask func(context.Context) error) error {
	err := ask(ctx)
	if err == nil || errors.As(err, new(*api.Error)) || ctx.Err() != nil || s.alive(ctx) {
		return err
	}
	if err := s.ensure(ctx); err != nil {
		return err
	}
	return ask(ctx)
}

// memberSocket is the control socket of a member that there is.
func memberSocket(ctx context.Context, name, member string) (path string, err error) {
	s, err := openSharedClient(ctx)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	var n network.Network
	if err := s.do(ctx, func(ctx context.Context) (err error) { n, err = s.client.Network(ctx, name); return err }); err != nil {
		return "", err
	}
	for _, m := range n.Members {
		if m.Name == member {
			return s.dir.Socket(name, member)
		}
	}
	return "", fmt.Errorf("network %q has no member %q: see usernet network inspect %s", name, member, name)
}
